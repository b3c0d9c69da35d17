# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of processes."""

import pytest

from pyams_zmq.process.channel import open_channel


@pytest.fixture
def channel():
    """A channel: the end of the owner, and that of the child."""
    owner, control = open_channel()
    yield owner, control
    owner.close()
    control.close()
