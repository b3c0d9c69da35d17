# SPDX-License-Identifier: ZPL-2.1
"""The end of a ZMQStream: its own close, and a socket that other code closes."""

import asyncio
import os

import pytest
import zmq

from checks import until, wait_until
from handlers import RawProcess
from pyams_zmq.process.stream import ZMQStream
from streams import in_loop


@in_loop
async def test_close_with_messages_waiting(net, caplog):
    with net.stream(zmq.PULL, print) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        client.send(b'x')
        wait_until(subject.readable)
        subject.close()
        await asyncio.sleep(0)  # the loop runs what the stream has scheduled
    assert not caplog.records


def test_close_after_the_loop(net, caplog):
    async def make():
        return ZMQStream(net.socket(zmq.PULL))

    subject = asyncio.run(make())
    socket = subject.socket
    subject.close()
    assert socket.closed
    assert not caplog.records


@in_loop
async def test_coroutine_that_closes_the_stream(net):
    async def close(frames):
        await asyncio.sleep(0)
        subject.close()

    with net.stream(zmq.REP, close) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        await until(subject.closed)
        await until(lambda: not subject._tasks)


@in_loop
async def test_context_that_was_terminated(net, caplog):
    with net.stream(zmq.PULL, print) as (subject, address):
        await asyncio.to_thread(net.context.term)
        await until(lambda: subject.socket is None)  # the method `closed` would close it
        assert subject.closed()
        with pytest.raises(OSError, match='Stream is closed'):
            subject.flush()
    [record] = caplog.records
    assert record.levelname == 'ERROR'
    assert record.message == (
        f'The PULL stream {address} ends: other code has terminated its context'
    )


@pytest.mark.parametrize('has_event', [True, False])
@in_loop
async def test_socket_closed_by_other_code(net, caplog, has_event):
    """An event may announce that. The loop does not watch another file by mistake meanwhile."""
    with net.stream(zmq.PULL, print) as (subject, address):
        calls = []
        if not has_event:
            subject._loop.remove_reader(subject._fd)
        subject.set_close_callback(lambda: calls.append(subject))
        fd = subject.socket.fd
        subject.socket.close()
        files = [os.open(os.devnull, os.O_RDONLY)]
        while files[-1] < fd:
            files.append(os.open(os.devnull, os.O_RDONLY))
        await until(lambda: subject.socket is None)
        for file in files:
            os.close(file)
        assert calls == [subject]
        assert subject.closed()
    [record] = caplog.records
    assert record.levelname == 'ERROR'
    assert record.message == f'The PULL stream {address} ends: other code has closed its socket'


@pytest.mark.filterwarnings('error')
@in_loop
async def test_use_of_a_socket_closed_by_other_code(net, caplog):
    with net.stream(zmq.PUSH) as (subject, _address):
        subject.socket.close()
        with pytest.raises(zmq.ZMQError, match='not a socket|non-socket'):
            subject.send(b'x')
        assert subject.closed()
        with pytest.raises(OSError, match='Stream is closed'):
            subject.send(b'x')
    assert len(caplog.records) == 1


@in_loop
async def test_socket_closed_in_its_callback(net, caplog):
    """Other messages wait in it at that moment."""
    received = []

    def close(msg):
        received.append(msg)
        subject.socket.close()

    with net.stream(zmq.PULL, address='inproc://test') as (subject, address):
        client = net.connect(zmq.PUSH, address)
        for _ in range(20):
            client.send(b'x')
        subject.on_recv(close)
        await until(lambda: subject.socket is None)
    assert received == [[b'x']]
    assert len(caplog.records) == 1


@in_loop
async def test_reply_on_a_socket_that_was_closed(net):
    received = []
    with net.stream(zmq.REP, received.append) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        await until(lambda: received)
        subject.io_loop.remove_handler(subject.socket)
        subject.socket.close()
        with pytest.raises(zmq.ZMQError, match='not a socket|non-socket'):
            subject.send(b'x')
        subject.socket = None


def test_process_whose_stream_was_closed(start, ask, tmp_path):
    """It does not become deaf without a record in the log; other streams serve on."""
    log = tmp_path / 'log'
    process = start(log, factory=RawProcess)
    assert ask(process, ['close_raw', None])[0] == 200
    wait_until(lambda: 'ends: other code has closed its socket' in log.read_text())
    assert 'The ROUTER stream tcp://127.0.0.1:' in log.read_text()
    assert ask(process, ['echo', 1]) == [200, 1]
