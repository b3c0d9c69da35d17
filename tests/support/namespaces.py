# SPDX-License-Identifier: ZPL-2.1
"""Tests in namespaces of their own, where other things are mounted."""

import ctypes
import os
import subprocess
from multiprocessing.context import ForkProcess

import pytest

from checks import TIMEOUT

_CLONE_NEWNS = 0x20000


def mount(*args):
    """Mount something; for a function that `run_unshared` calls."""
    subprocess.run(['mount', *args], check=True)


def run_unshared(function, *args):
    """Call a function in a fork with a mount namespace of its own; skip if that is not allowed."""
    if os.geteuid() != 0 or subprocess.run(['unshare', '-m', 'true'], check=False).returncode:
        pytest.skip('only root may mount something in a namespace of its own')
    child = ForkProcess(target=_enter, args=(function, args))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


def _enter(function, args):
    assert ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0
    mount('--make-rprivate', '/')
    function(*args)
