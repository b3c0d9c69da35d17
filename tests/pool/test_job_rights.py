# SPDX-License-Identifier: ZPL-2.1
"""Who may see, cancel and retry which jobs; and limits, draining and a full disk."""

import time
from contextlib import ExitStack, contextmanager

import pytest

from checks import TIMEOUT, wait_until
from job_checks import Asker
from namespaces import *  # noqa: F403
