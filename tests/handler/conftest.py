# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of handlers."""

import pytest
import zmq

from messages import Dealer


@pytest.fixture
def connect():
    """Open DEALER clients."""
    context = zmq.Context()
    dealers = []

    def make(process):
        dealers.append(Dealer(context, process.bound_address))
        return dealers[-1]

    yield make
    context.destroy(0)
