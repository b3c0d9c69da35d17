# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of the monitor."""

from contextlib import ExitStack

import pytest

from pyams_zmq.monitor import health, metrics, question
from watched_services import Services


@pytest.fixture
def services(tmp_path):
    """Return the services of an application; stop them at the end."""
    with ExitStack() as stack:
        yield Services(tmp_path, stack)


@pytest.fixture(autouse=True)
def set_timeout(monkeypatch):
    """Let services have more time than a second, because the machine may be loaded.

    :return: sets the seconds, for a test in which a service does not answer
    """

    def set_seconds(seconds):
        for module in (health, metrics):
            monkeypatch.setattr(module, 'TIMEOUT', seconds)

    monkeypatch.setattr(question, 'SLACK', 20)
    set_seconds(20)
    return set_seconds


@pytest.fixture
def stack():
    """Return an ExitStack that is left at the end."""
    with ExitStack() as stack:
        yield stack
