# SPDX-License-Identifier: ZPL-2.1
"""Runs the command line: ``python -m pyams_zmq``."""

import sys

from pyams_zmq.cli import main

if __name__ == '__main__':
    sys.exit(main())
