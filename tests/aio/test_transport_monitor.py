# SPDX-License-Identifier: ZPL-2.1
"""Events of connections."""

import errno

import pytest
import zmq
import zmq.asyncio

from aio_loops import address_of, end, make, os_error, plain
from checks import until
from pyams_zmq.aio import SocketEvent


async def test_monitor(run, context):
    transport, protocol = await make(zmq.ROUTER)
    address = address_of(transport)
    assert (await transport.enable_monitor()).startswith('inproc://')
    peer = plain(context, zmq.DEALER, address)
    await until(lambda: zmq.EVENT_HANDSHAKE_SUCCEEDED in [e.event for e in protocol.events])
    event = protocol.events[0]
    assert isinstance(event, SocketEvent)
    assert event.event == zmq.EVENT_ACCEPTED
    assert event.endpoint == address
    assert event.value >= 0
    transport.enable_monitor(zmq.EVENT_DISCONNECTED)
    protocol.events.clear()
    peer.close()
    await until(lambda: zmq.EVENT_DISCONNECTED in [e.event for e in protocol.events])
    assert await transport.disable_monitor() == ''
    transport.disable_monitor()
    protocol.events.clear()
    peer = plain(context, zmq.DEALER, address)
    peer.send(b'x')
    await until(lambda: protocol.messages)
    assert protocol.events == []
    await end(transport)


async def test_monitor_without_a_descriptor(run, context, monkeypatch):
    def full(_fd):
        raise OSError(errno.EMFILE, 'Too many open files')

    transport, protocol = await make(zmq.ROUTER)
    with monkeypatch.context() as patched, os_error(errno.EMFILE):
        patched.setattr('os.dup', full)
        transport.enable_monitor()
    transport.enable_monitor(zmq.EVENT_ACCEPTED)
    plain(context, zmq.DEALER, address_of(transport))
    await until(lambda: protocol.events)
    await end(transport)


@pytest.mark.parametrize('context_class', [zmq.Context, zmq.asyncio.Context])
async def test_monitor_in_another_context(run, context, context_class):
    with context_class() as own:
        sock = own.socket(zmq.ROUTER, socket_class=zmq.Socket)
        transport, protocol = await make(zmq.ROUTER, zmq_sock=sock)
        await transport.enable_monitor(zmq.EVENT_ACCEPTED)
        plain(context, zmq.DEALER, transport.bind('tcp://127.0.0.1:*'))
        await until(lambda: protocol.events)
        await end(transport)
    # Its end waits for all sockets, the one of the monitor, too.
