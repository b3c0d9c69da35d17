# SPDX-License-Identifier: ZPL-2.1
"""The application of the ini file in the current folder, for servers that import it."""

import os

from pyramid.paster import get_app

application = get_app('application.ini', options={'address': os.environ['APP_ADDRESS']})
