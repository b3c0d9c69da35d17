# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of supervisors."""

from contextlib import nullcontext

import pytest

from pyams_zmq.supervisor import Supervisor, driver
from supervisors import Fakes


@pytest.fixture
def fakes(monkeypatch):
    """Fake processes, and a supervisor of one of them."""
    monkeypatch.setattr(driver, 'has_ended', lambda process: process.ended)
    monkeypatch.setattr(driver, 'open_pidfd', lambda pid: nullcontext(0))
    monkeypatch.setattr(Supervisor, 'hang_timeout', 0)
    return Fakes()


@pytest.fixture
def run(run_program, tmp_path):
    """Start programs; their first argument is the folder of the test."""
    return lambda code, *args: run_program('-c', code, str(tmp_path), *args)


@pytest.fixture
def address(tmp_path):
    """Address of the process `echo` of the programs."""
    return f'ipc://{tmp_path}/echo'
