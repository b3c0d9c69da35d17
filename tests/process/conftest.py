# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of processes."""

import pytest

from pyams_zmq.process.channel import open_channel
from streams import Net


@pytest.fixture
def channel():
    """A channel: the end of the owner, and that of the child."""
    owner, control = open_channel()
    yield owner, control
    owner.close()
    control.close()


@pytest.fixture
def net():
    """Sockets of a test."""
    net = Net()
    yield net
    net.context.destroy(0)  # monitors too
