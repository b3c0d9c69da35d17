# SPDX-License-Identifier: ZPL-2.1
"""Tests in namespaces of their own, where other things are mounted."""

import ctypes
import os
import subprocess
from multiprocessing.context import ForkProcess

import pytest

from checks import TIMEOUT

_CLONE_NEWNS = 0x20000
_CLONE_NEWNET = 0x40000000


def mount(*args):
    """Mount something; for a function that `run_unshared` calls."""
    subprocess.run(['mount', *args], check=True)


def name_hosts(folder, **names):
    """Give names to addresses in /etc/hosts; for a function that `run_unshared` calls."""
    lines = [f'{address} {name}.test' for name, all_of in names.items() for address in all_of]
    hosts = folder / 'hosts'
    hosts.write_text('\n'.join(['127.0.0.1 localhost', '::1 localhost', *lines, '']))
    if not os.path.ismount('/etc/hosts'):
        mount('--bind', hosts, '/etc/hosts')


def run_unshared(function, *args, has_network=True):
    """Call a function in a fork with a mount namespace of its own; skip if that is not allowed.

    :param has_network: false for a network namespace without interfaces
    """
    if os.geteuid() != 0 or subprocess.run(['unshare', '-m', 'true'], check=False).returncode:
        pytest.skip('only root may mount something in a namespace of its own')
    child = ForkProcess(target=_enter, args=(function, args, has_network))
    child.start()
    child.join(3 * TIMEOUT)  # it may wait for several events
    assert child.exitcode == 0


def _enter(function, args, has_network):
    flags = _CLONE_NEWNS | (0 if has_network else _CLONE_NEWNET)
    assert ctypes.CDLL(None).unshare(flags) == 0
    mount('--make-rprivate', '/')
    function(*args)
