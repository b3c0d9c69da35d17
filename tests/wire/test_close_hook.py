# SPDX-License-Identifier: ZPL-2.1
"""A method that is called when other code closes a socket."""

import threading

import pytest
import zmq

from pyams_zmq.wire.close_hook import hook_close, unhook_close


class Owner:
    """Counts the calls of its method."""

    calls = 0

    def note(self):
        self.calls += 1


@pytest.fixture
def context():
    """A context that is destroyed at the end."""
    context = zmq.Context()
    yield context
    context.destroy(0)


def test_close(context):
    owner = Owner()
    for close in (
        lambda socket: socket.close(),
        lambda socket: socket.close(linger=0),
        lambda socket: socket.__exit__(),
        lambda _socket: context.destroy(0),
    ):
        socket = context.socket(zmq.PULL)
        hook_close(socket, owner.note)
        thread = threading.Thread(target=close, args=[socket])
        thread.start()
        thread.join()
        assert socket.closed
    assert owner.calls == 4


def test_end_of_the_hook(context):
    owner = Owner()
    socket = context.socket(zmq.PULL)
    hook_close(socket, owner.note)
    unhook_close(socket)
    unhook_close(socket)
    socket.close()
    assert owner.calls == 0


def test_owner_is_not_kept(context):
    socket = context.socket(zmq.PULL)
    hook_close(socket, Owner().note)
    socket.close()
    assert socket.closed


def test_unclosed_socket(context):
    """It is collected as before."""
    owner = Owner()
    socket = context.socket(zmq.PULL)
    hook_close(socket, owner.note)
    with pytest.warns(ResourceWarning, match='Unclosed socket'):
        socket.__del__()
    assert owner.calls == 1
