# SPDX-License-Identifier: ZPL-2.1
"""Code that runs as another user of the system."""

import os
from multiprocessing.context import ForkProcess

import pytest
import tornado.platform.asyncio  # noqa: F401 - now: another user may not be able to read it

from checks import TIMEOUT

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason='only root may become another user')


def run_as(user, group, function, *args):
    """Call a function in a fork that has become another user, with one group."""
    child = ForkProcess(target=_run, args=(user, group, function, args))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


def _run(user, group, function, args):
    os.setgroups([])
    os.setegid(group)
    os.seteuid(user)
    try:
        function(*args)
    finally:
        os.seteuid(0)  # the reports of this process belong to root
