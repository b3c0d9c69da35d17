# SPDX-License-Identifier: ZPL-2.1
"""Limits of the write buffer, and peers whose queues are full."""

import asyncio
import time

import pytest
import zmq
import zmq.asyncio

from aio_loops import ONE_LOOP, address_of, end, make, make_unconnected, plain
from checks import until


async def test_limits(run, context):
    transport, protocol = await make_unconnected(high=10, low=4)
    assert transport.get_write_buffer_limits() == (4, 10)
    transport.write([b'12345', b'12345'])
    assert protocol.calls == ['made']  # equal is not above
    transport.write([b'1'])
    assert protocol.calls == ['made', 'pause']  # within the call
    transport.write([b'1' * 100])
    peer = plain(context, zmq.PULL, address_of(transport))
    await until(lambda: 'resume' in protocol.calls)
    assert protocol.calls == ['made', 'pause', 'resume']
    assert [peer.recv_multipart() for _number in range(3)][1] == [b'1']
    await end(transport)
    assert protocol.calls == ['made', 'pause', 'resume', 'lost']


async def test_resume_at_the_low_limit(run):
    transport, protocol = await make_unconnected(high=10, low=4)
    transport.write([b'1' * 11])
    transport.set_write_buffer_limits(high=20, low=10)
    assert protocol.calls == ['made', 'pause']
    transport.set_write_buffer_limits(high=20, low=11)
    assert protocol.calls == ['made', 'pause', 'resume']
    transport.set_write_buffer_limits(high=0)
    assert transport.get_write_buffer_limits() == (0, 0)
    assert protocol.calls == ['made', 'pause', 'resume', 'pause']
    await end(transport)
    assert protocol.calls == ['made', 'pause', 'resume', 'pause', 'resume', 'lost']


@ONE_LOOP
async def test_limit_values(run):
    transport, _protocol = await make_unconnected()
    assert transport.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
    transport.set_write_buffer_limits(low=3)
    assert transport.get_write_buffer_limits() == (3, 12)
    transport.set_write_buffer_limits(high=100)
    assert transport.get_write_buffer_limits() == (25, 100)
    for high, low in ((1, 2), (-1, None), (1, -1)):
        with pytest.raises(ValueError, match='must be >= 0'):
            transport.set_write_buffer_limits(high, low)
    assert transport.get_write_buffer_limits() == (25, 100)
    await end(transport)


async def test_empty_frames_count_for_limit_zero(run, context):
    """With a limit of 0, the buffer must be empty."""
    transport, protocol = await make(zmq.PUSH)
    transport.set_write_buffer_limits(high=0)
    transport.write([b''])
    transport.write([b''])
    assert protocol.calls == ['made', 'pause']
    puller = plain(context, zmq.PULL, address_of(transport))
    await until(lambda: protocol.calls == ['made', 'pause', 'resume'])
    assert [puller.recv() for _ in range(2)] == [b'', b'']
    await end(transport)


@pytest.fixture
def full_router(context):
    """A ROUTER transport with two peers, of which one has a full queue."""

    async def made():
        sock = zmq.Context.instance().socket(zmq.ROUTER)
        sock.router_mandatory = True
        sock.sndhwm = 1
        sock.sndbuf = 4096
        transport, protocol = await make(zmq.ROUTER, zmq_sock=sock)
        address = transport.bind('ipc://*')
        peers = []
        for name in (b'full', b'free'):
            peer = context.socket(zmq.DEALER)
            peer.rcvhwm = 1
            peer.rcvbuf = 4096
            peer.routing_id = name
            peer.connect(address)
            peer.send(b'hello')
            peers.append(peer)
        await until(lambda: len(protocol.messages) == 2)
        sent = 0
        while not transport.get_write_buffer_size():
            while not transport.get_write_buffer_size():
                transport.write([b'full', b'x' * 10_000])
                sent += 1
            # Measures time: no event shows that the I/O threads and the system take no more.
            await asyncio.sleep(0.25)
        return transport, protocol, peers, sent

    return made


async def test_peer_with_a_full_queue(run, full_router):
    transport, _protocol, (full, free), sent = await full_router()
    transport.write([b'free', b'behind'])
    started = time.thread_time()
    await asyncio.sleep(0.2)  # for what must not happen
    assert time.thread_time() - started < 0.1  # it does not poll in a loop
    assert transport.get_write_buffer_size()

    def read():
        for _number in range(sent):
            full.recv()

    await asyncio.get_running_loop().run_in_executor(None, read)
    await until(lambda: transport.get_write_buffer_size() == 0)
    assert free.recv() == b'behind'
    await end(transport)


async def test_peer_leaves_before_its_buffered_messages_are_sent(run, full_router):
    transport, protocol, (full, free), _sent = await full_router()
    transport.write([b'free', b'behind'])
    full.close(0)
    await until(lambda: transport.get_write_buffer_size() == 0)
    assert free.recv() == b'behind'
    assert protocol.calls == ['made']
    assert {error['exception'].errno for error in run.errors} == {zmq.EHOSTUNREACH}
    run.errors.clear()
    await end(transport)
