# SPDX-License-Identifier: ZPL-2.1
"""What a transport sends and receives."""

import array
import asyncio
import errno
import select
import time
from functools import partial

import pytest
import zmq
import zmq.asyncio

from aio_loops import ONE_LOOP, Recorder, address_of, end, make, make_unconnected, os_error, plain
from checks import TIMEOUT, until
from pyams_zmq.aio.pump import GUARD, MOST


async def test_echo(run):
    server, echo = await make(
        zmq.ROUTER, partial(Recorder, lambda transport, data: transport.write(data))
    )
    client, protocol = await make(zmq.DEALER, connect=address_of(server))
    assert protocol.calls == echo.calls == ['made']
    client.write([b''])
    client.write((b'1', b'', b'x' * 1_000_000))
    await until(lambda: len(protocol.messages) == 2)
    assert protocol.messages == [(b'',), (b'1', b'', b'x' * 1_000_000)]
    assert all(type(part) is bytes for message in echo.messages for part in message)
    await end(client, server)
    assert protocol.calls == echo.calls == ['made', 'lost']


async def test_buffered_frames_are_copies(run, context):
    transport, _protocol = await make_unconnected()
    changing = bytearray(b'one')
    numbers = array.array('I', [1, 2])
    view = memoryview(b'a-b-c')[::2]
    transport.write([changing, memoryview(changing), numbers, view])
    transport.write(part for part in (changing, b'three'))
    changing[:] = b'two'
    numbers[0] = 3
    assert transport.get_write_buffer_size() == 3 + 3 + 8 + 3 + 3 + 5
    peer = plain(context, zmq.PULL, address_of(transport))
    await until(lambda: transport.get_write_buffer_size() == 0)
    one_two = array.array('I', [1, 2]).tobytes()
    assert peer.recv_multipart() == [b'one', b'one', one_two, b'abc']
    assert peer.recv_multipart() == [b'one', b'three']
    await end(transport)


async def test_write_sends_without_the_loop(run, context):
    transport, _protocol = await make_unconnected()
    peer = plain(context, zmq.PULL, address_of(transport))
    transport.write([b'first'])
    await until(lambda: transport.get_write_buffer_size() == 0)
    transport.write([bytearray(b'now'), b'!'])
    assert transport.get_write_buffer_size() == 0
    assert peer.recv_multipart() == [b'first']
    assert peer.recv_multipart() == [b'now', b'!']  # before the loop has run
    await end(transport)


@ONE_LOOP
@pytest.mark.parametrize('data', [b'ab', bytearray(b'ab'), memoryview(b'ab'), 'ab', '', 1])
async def test_bad_message(run, data):
    transport, _protocol = await make_unconnected()
    with pytest.raises(TypeError):
        transport.write(data)
    await end(transport)


@ONE_LOOP
@pytest.mark.parametrize('part', ['text', 1, None, [b'']])
async def test_bad_frame(run, part):
    transport, _protocol = await make_unconnected()
    with pytest.raises(TypeError):
        transport.write([b'frame', part])
    assert '0 messages (0 bytes)' in repr(transport)
    await end(transport)


@ONE_LOOP
@pytest.mark.parametrize('data', [None, (), [], b'', bytearray(), memoryview(b''), iter(())])
async def test_empty_message(run, data):
    """It is not sent, and not even noticed by a closed transport."""
    transport, _protocol = await make_unconnected()
    transport.write()
    transport.write(data)
    assert '0 messages (0 bytes)' in repr(transport)
    assert transport.can_write_eof() is False
    await end(transport)
    transport.write(data)


async def test_other_callbacks_run_between_many_messages(run, context):
    transport, protocol = await make(zmq.PULL)
    transport.setsockopt(zmq.RCVHWM, 0)
    transport.unbind(address_of(transport))
    peer = context.socket(zmq.PUSH)
    peer.sndhwm = 0
    peer.connect(transport.bind('tcp://127.0.0.1:*'))
    transport.pause_reading()
    for _number in range(100_000):
        peer.send(b'x')
    turns = 0
    transport.resume_reading()
    while len(protocol.messages) < 100_000:
        before = len(protocol.messages)
        await asyncio.sleep(0)  # one iteration of the loop
        assert len(protocol.messages) - before <= 2 * (MOST + 1)
        turns += 1
    assert turns > 100
    await end(transport)


async def test_slow_protocol_does_not_stop_sending(run, context):
    def work(transport, data):
        time.sleep(0.006)  # the work, which is longer than a turn

    transport, protocol = await make(zmq.PAIR, partial(Recorder, work))
    for number in range(20):
        transport.write([b'%d' % number])
    assert transport.get_write_buffer_size()
    peer = plain(context, zmq.PAIR, address_of(transport))
    for _number in range(20):
        peer.send(b'x')
    await until(lambda: len(protocol.messages) == 20)
    assert transport.get_write_buffer_size() == 0  # neither waited for the other
    await end(transport)


async def test_close_while_paused(run, context):
    transport, protocol = await make(zmq.PULL)
    fd = transport._pump._fd
    peer = plain(context, zmq.PUSH, address_of(transport))
    transport.pause_reading()
    transport.pause_reading()
    assert not transport.is_reading()
    peer.send(b'x')
    await asyncio.sleep(2 * GUARD)  # for what must not come
    assert protocol.messages == []
    transport.close()
    transport.pause_reading()
    transport.resume_reading()
    assert not transport.is_reading()
    assert not asyncio.get_running_loop().remove_reader(fd)
    await until(lambda: 'lost' in protocol.calls)
    assert protocol.messages == []


async def test_pause_within_a_turn(run, context):
    transport, protocol = await make(
        zmq.PULL, partial(Recorder, lambda transport, data: transport.pause_reading())
    )
    peer = plain(context, zmq.PUSH, address_of(transport))
    for number in range(1, 6):
        peer.send(b'x')
        await until(lambda number=number: len(protocol.messages) == number)
        assert not transport.is_reading()
        transport.resume_reading()
        assert transport.is_reading()
    await end(transport)


async def test_requests_wait_for_replies(run, context):
    transport, protocol = await make(zmq.REQ)
    for number in range(3):
        transport.write([b'%d' % number])
    peer = plain(context, zmq.REP, address_of(transport))

    def serve(count):
        for _number in range(count):
            peer.send(peer.recv() + b'!')

    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, serve, 3)
    await until(lambda: len(protocol.messages) == 3)
    assert protocol.messages == [(b'0!',), (b'1!',), (b'2!',)]
    for number in range(3):
        transport.write([b'%d' % number])
    assert transport.get_write_buffer_size()
    transport.close()
    await loop.run_in_executor(None, serve, 3)
    await until(lambda: 'lost' in protocol.calls)
    assert len(protocol.messages) == 3


async def test_second_reply_is_an_error(run, context):
    transport, protocol = await make(zmq.REP)
    peer = plain(context, zmq.REQ, address_of(transport))
    other = plain(context, zmq.REQ, address_of(transport))
    peer.send(b'request')
    await until(lambda: protocol.messages)
    other.send(b'other')
    transport.write([b'reply'])
    with os_error(zmq.EFSM):
        transport.write([b'second reply'])
    assert peer.recv() == b'reply'
    await until(lambda: len(protocol.messages) == 2)
    transport.write([b'reply'])
    assert other.recv() == b'reply'
    await end(transport)


async def test_write_that_fails_loses_no_message(run, context):
    transport, protocol = await make(zmq.REP)
    peer = plain(context, zmq.REQ, address_of(transport))
    peer.send(b'first')
    await until(lambda: protocol.messages)
    transport.write([b'reply'])
    assert peer.recv() == b'reply'
    peer.send(b'second')
    # `get_extra_info` would make the transport look at its socket at regular intervals.
    assert select.select([transport._pump._fd], [], [], TIMEOUT)[0]
    peer.poll(10)  # libzmq reads its commands again some milliseconds after the last time
    with os_error(zmq.EFSM):
        transport.write([b'second reply'])
    await until(lambda: len(protocol.messages) == 2)
    await end(transport)


@ONE_LOOP
async def test_write_on_a_pull_socket(run):
    transport, protocol = await make(zmq.PULL)
    with os_error(errno.EOPNOTSUPP):
        transport.write([b'x'])
    assert protocol.calls == ['made']
    await end(transport)


@pytest.mark.parametrize('kind', [zmq.PUB, zmq.XPUB])
async def test_publish(run, context, kind):
    """A subscription arrives, which a PUB socket cannot receive."""
    transport, protocol = await make(kind)
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b'a')
    subscriber.connect(address_of(transport))
    if kind == zmq.XPUB:
        await until(lambda: protocol.messages == [(b'\x01a',)])
    else:  # a PUB does not announce a subscription
        while not subscriber.poll(1):
            transport.write([b'a', b'0'])
            await asyncio.sleep(0)
    transport.write([b'a', b'1'])
    transport.write([b'b', b'2'])
    transport.write([b'a', b'3'])
    while (message := subscriber.recv_multipart()) == [b'a', b'0']:
        pass
    assert [message, subscriber.recv_multipart()] == [[b'a', b'1'], [b'a', b'3']]
    assert not transport.is_closing()
    await end(transport)
