# SPDX-License-Identifier: ZPL-2.1
"""A message is received although an access to the socket has cleared its descriptor."""

import asyncio
import errno

import pytest
import zmq
import zmq.asyncio

from aio_loops import INPROC, end, make, os_error, plain
from checks import until
from pyams_zmq.aio.pump import GUARD


def get_unknown_option(transport):
    with os_error(errno.EINVAL):
        transport.getsockopt(9999)


ACCESSES = {
    'getsockopt': lambda transport, sock: transport.getsockopt(zmq.EVENTS),
    'unknown option': lambda transport, sock: get_unknown_option(transport),
    'setsockopt': lambda transport, sock: transport.setsockopt(zmq.LINGER, 0),
    'repr': lambda transport, sock: repr(transport),
    'write': lambda transport, sock: transport.write([b'x']),
    'bind': lambda transport, sock: transport.bind('tcp://127.0.0.1:*'),
    'listeners': lambda transport, sock: transport.listeners(),
    'pause': lambda transport, sock: (transport.pause_reading(), transport.resume_reading()),
    'monitor': lambda transport, sock: transport.enable_monitor(),
    'zmq_socket': lambda transport, sock: sock.getsockopt(zmq.EVENTS),
    'zmq_socket repr': lambda transport, sock: repr(sock),
    'zmq_socket send': lambda transport, sock: sock.send(b'x'),
    'zmq_socket poll': lambda transport, sock: sock.poll(0),
    'zmq_socket later': lambda transport, sock: asyncio.get_running_loop().call_later(
        2 * GUARD, sock.getsockopt, zmq.EVENTS
    ),
}
"""Accesses to a socket, which may clear its descriptor"""


@pytest.mark.parametrize('way', ACCESSES)
async def test_message_after_an_access_to_the_socket(run, way):
    transport, protocol = await make(zmq.PAIR, bind=INPROC)
    peer = plain(zmq.Context.instance(), zmq.PAIR, INPROC)
    sock = None
    if way.startswith('zmq_socket'):
        sock = transport.get_extra_info('zmq_socket')
    peer.send(b'first')
    await until(lambda: len(protocol.messages) == 1)
    for number in range(2, 5):
        peer.send(b'next')  # it is there at once
        ACCESSES[way](transport, sock)
        await until(lambda number=number: len(protocol.messages) == number)
    peer.close()
    await end(transport)


async def test_room_after_an_access_to_the_socket(run):
    """A buffered message is sent although the access has cleared the descriptor."""
    transport, _protocol = await make(zmq.PUSH, bind=INPROC)
    transport.write([b'x'])
    for _ in range(3):
        await asyncio.sleep(0)  # a turn that is due would send it later
    peer = plain(zmq.Context.instance(), zmq.PULL, INPROC)  # it is connected at once
    transport.getsockopt(zmq.EVENTS)
    await until(lambda: transport.get_write_buffer_size() == 0)
    assert peer.recv() == b'x'
    peer.close()
    await end(transport)


async def test_messages_in_a_passed_socket(run, context):
    sock = context.socket(zmq.PULL)
    port = sock.bind_to_random_port('tcp://127.0.0.1')
    peer = plain(context, zmq.PUSH, f'tcp://127.0.0.1:{port}')
    for number in range(3):
        peer.send(b'%d' % number)
    while not sock.poll(1000):  # which clears the descriptor
        pass
    transport, protocol = await make(zmq.PULL, zmq_sock=sock)
    assert transport.get_extra_info('zmq_socket') is sock
    await until(lambda: len(protocol.messages) == 3)
    assert transport.listeners() == frozenset()
    await end(transport)
    assert sock.closed
