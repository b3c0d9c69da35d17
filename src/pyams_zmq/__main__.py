# SPDX-License-Identifier: ZPL-2.1
"""``python -m pyams_zmq``."""

import sys

from pyams_zmq.cli import main

if __name__ == '__main__':
    sys.exit(main())
