# SPDX-License-Identifier: ZPL-2.1
"""Subscriptions, options, and the protocol of a transport."""

import asyncio
import errno
from contextlib import suppress

import pytest
import zmq
import zmq.asyncio

from aio_loops import ONE_LOOP, Recorder, address_of, end, make, os_error, plain
from checks import until
from raw_peer import RawPeer, frame


async def test_subscriptions(run, context):
    transport, protocol = await make(zmq.SUB)
    publisher = plain(context, zmq.XPUB, address_of(transport))
    transport.subscribe(b'a')
    transport.subscribe(b'a')
    transport.setsockopt(zmq.SUBSCRIBE, b'b')
    assert transport.subscriptions() == {b'a', b'b'}
    loop = asyncio.get_running_loop()
    for expected in (b'\1a', b'\1b'):
        assert await loop.run_in_executor(None, publisher.recv) == expected
    for topic in (b'a', b'b', b'c'):
        publisher.send(topic)
    await until(lambda: len(protocol.messages) == 2)
    assert protocol.messages == [(b'a',), (b'b',)]
    transport.unsubscribe(b'a')
    assert await loop.run_in_executor(None, publisher.recv) == b'\0a'
    transport.setsockopt(zmq.UNSUBSCRIBE, b'b')
    assert await loop.run_in_executor(None, publisher.recv) == b'\0b'
    assert transport.subscriptions() == frozenset()
    with pytest.raises(TypeError, match='not bytes'):
        transport.subscribe('a')
    await end(transport)


@ONE_LOOP
async def test_subscribe_on_a_pub_socket(run):
    transport, _protocol = await make(zmq.PUB)
    for call in (
        lambda: transport.subscribe(b'a'),
        lambda: transport.unsubscribe(b'a'),
        transport.subscriptions,
    ):
        with pytest.raises(NotImplementedError, match='PUB'):
            call()
    with os_error(errno.EINVAL):
        transport.setsockopt(zmq.SUBSCRIBE, b'a')
    await end(transport)


@pytest.mark.parametrize('zmq_type', [zmq.PUB, zmq.XPUB])
@pytest.mark.parametrize('minor', [0, 1])
async def test_long_topic(run, zmq_type, minor):
    """Formerly each byte of it took more than 100 bytes of memory."""
    topic = b'a' * 2**20
    data = {0: frame(b'\1' + topic), 1: frame(b'\x09SUBSCRIBE' + topic, command=True)}[minor]

    def send(address):
        with RawPeer(address, kind=b'SUB', minor=minor) as subscriber:
            with suppress(ConnectionError):
                subscriber.send(data)
            subscriber.wait_end()

    transport, _protocol = await make(zmq_type)
    await asyncio.get_running_loop().run_in_executor(None, send, address_of(transport))
    await end(transport)


async def test_size_of_a_message_to_an_xpub_socket(run, context):
    transport, protocol = await make(zmq.XPUB, bind=())
    assert transport.getsockopt(zmq.MAXMSGSIZE) == 4096
    transport.setsockopt(zmq.MAXMSGSIZE, 10_000)
    transport.bind('tcp://127.0.0.1:*')
    peer = plain(context, zmq.XSUB, address_of(transport))
    peer.send(b'x' * 10_000)
    await until(lambda: protocol.messages)
    assert protocol.messages == [(b'x' * 10_000,)]
    await end(transport)


async def test_set_protocol(run, context):
    transport, protocol = await make(zmq.PULL)
    peer = plain(context, zmq.PUSH, address_of(transport))
    other = Recorder()
    assert transport.get_protocol() is protocol
    transport.set_protocol(other)
    assert transport.get_protocol() is other
    peer.send(b'x')
    await until(lambda: other.messages)
    await end(transport)
    assert (protocol.calls, other.calls) == (['made'], ['lost'])


@ONE_LOOP
async def test_extra_info(run):
    transport, _protocol = await make(zmq.DEALER)
    assert isinstance(transport.get_extra_info('zmq_socket'), zmq.Socket)
    assert transport.get_extra_info('zmq_socket') is transport.get_extra_info('zmq_socket')
    assert transport.get_extra_info('zmq_type') == zmq.DEALER
    assert transport.get_extra_info('else') is None
    assert transport.get_extra_info('else', 1) == 1
    await end(transport)


@ONE_LOOP
async def test_options(run):
    transport, _protocol = await make(zmq.DEALER)
    transport.setsockopt(zmq.RCVHWM, 5)
    assert transport.getsockopt(zmq.RCVHWM) == 5
    with os_error(errno.EINVAL):
        transport.setsockopt(zmq.RCVHWM, -5)
    await end(transport)
