# SPDX-License-Identifier: ZPL-2.1
"""Callbacks of a ZMQStream that fail, also in a process."""

import asyncio

import pytest
import zmq

from checks import until, wait_until
from handlers import RawProcess
from streams import BURST, in_loop, receive


class CallbackError(Exception):
    """Raised by the callbacks."""


def raising(frames):
    raise CallbackError


async def raising_later(frames):
    await asyncio.sleep(0)
    raise CallbackError


@pytest.mark.parametrize('callback', [raising, raising_later])
@pytest.mark.parametrize('envelope', [[b''], [b'hop', b'']])
@in_loop
async def test_failing_callback_gets_a_reply(net, callback, envelope, caplog):
    with net.stream(zmq.REP, callback) as (_subject, address):
        client = net.connect(zmq.DEALER, address)
        for _ in range(BURST):
            client.send_multipart([*envelope, b'x'])
        replies = await receive(client, BURST)
        assert replies == [[*envelope, b'[500,"Internal error"]']] * BURST
        assert not client.poll(0)
    assert 'CallbackError' in caplog.text


@pytest.mark.parametrize('error', [asyncio.CancelledError, GeneratorExit, BaseException])
@in_loop
async def test_callback_fails_with_a_base_exception(net, error):
    def fail(frames):
        raise error

    with net.stream(zmq.REP, fail) as (_subject, address):
        client = net.connect(zmq.DEALER, address)
        for _ in range(10):
            client.send_multipart([b'', b'x'])
        assert await receive(client, 10) == [[b'', b'[500,"Internal error"]']] * 10


@in_loop
async def test_callback_that_fails_after_its_reply(net):
    def fail(frames):
        subject.send(b'reply')
        raise CallbackError

    with net.stream(zmq.REP, fail) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        for _ in range(BURST):
            client.send_multipart([b'', b'x'])
        assert await receive(client, BURST) == [[b'', b'reply']] * BURST


@in_loop
async def test_callback_that_fails_after_its_reply_and_the_next_message(net):
    # Its failure must not reply to the message that was received meanwhile.
    fail, failed = asyncio.Event(), []

    async def first(frames):
        subject.send(b'first')
        subject.on_recv(second)
        await fail.wait()
        failed.append(True)
        raise CallbackError

    async def second(frames):
        fail.set()
        await until(lambda: failed)
        await asyncio.sleep(0)  # the stream handles the failure
        subject.send(b'second')

    with net.stream(zmq.REP, first) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'1'])
        client.send_multipart([b'', b'2'])
        assert await receive(client, 2) == [[b'', b'first'], [b'', b'second']]


@in_loop
async def test_callback_that_closes_the_stream_and_fails(net, caplog):
    def fail(frames):
        subject.close()
        raise CallbackError

    with net.stream(zmq.REP, fail) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        client.send_multipart([b'', b'x'])
        await until(subject.closed)
        await asyncio.sleep(0)  # for a reply, which must not come
        assert not client.poll(0)


@in_loop
async def test_failing_callback_loses_no_message(net):
    received = []

    def fail(frames):
        received.append(frames)
        raise CallbackError

    with net.stream(zmq.PULL, fail) as (_subject, address):
        client = net.connect(zmq.PUSH, address)
        for _ in range(BURST):
            client.send(b'x')
        await until(lambda: len(received) == BURST)


@in_loop
async def test_on_send_that_fails(net, caplog):
    def fail(frames, status):
        raise CallbackError

    def reply_later(frames):
        asyncio.get_running_loop().call_soon(subject.send, frames[0])

    with net.stream(zmq.REP, reply_later) as (subject, address):
        subject.on_send(fail)
        client = net.connect(zmq.DEALER, address)
        for _ in range(BURST):
            client.send_multipart([b'', b'x'])
        assert await receive(client, BURST) == [[b'', b'x']] * BURST
    assert 'CallbackError' in caplog.text


# In a process


@pytest.fixture
def raw(start, ask, tmp_path):
    """Yield the addresses of raw callbacks in a process, by name."""
    process = start(factory=RawProcess, log_path=tmp_path / 'log')
    _status, ports = ask(process, ['raw_ports', None])
    yield {name: f'tcp://127.0.0.1:{port}' for name, port in ports.items()}
    assert ask(process, ['echo', 1]) == [200, 1]


FAILURES = [
    'ValueError',
    'Unprintable',
    'MemoryError',
    'CancelledError',
    'GeneratorExit',
    'SystemExit',
    'KeyboardInterrupt',
]


@pytest.mark.parametrize(
    ('callback', 'reply'),
    [
        ('fail', [b'[500,"Internal error"]']),
        ('async_fail', [b'[500,"Internal error"]']),
        ('reply_then_fail', [b'"replied"']),
        ('reply_then_async_fail', [b'"replied"']),
        ('half_reply_then_fail', [b'half', b'[500,"Internal error"]']),
    ],
)
def test_raw_callbacks(raw, net, callback, reply):
    client = net.connect(zmq.DEALER, raw[callback])
    number = 20
    for _ in range(number):
        for name in FAILURES:
            client.send_multipart([b'', name.encode()])
    for _ in range(number * len(FAILURES)):
        assert client.poll(5000)
        assert client.recv_multipart() == [b'', *reply]
    client.send_multipart([b'', b'ValueError'])
    assert client.poll(5000)
    assert client.recv_multipart() == [b'', *reply]
    assert not client.poll(0)


def test_raw_callbacks_are_logged(raw, net, tmp_path):
    client = net.connect(zmq.REQ, raw['fail'])
    client.send(b'ValueError')
    assert b'secret' not in client.recv()
    log = tmp_path / 'log'
    wait_until(lambda: 'ValueError: the secret of the handler' in log.read_text())
    assert 'in fail' in log.read_text()
