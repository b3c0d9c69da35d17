# SPDX-License-Identifier: ZPL-2.1
"""The protocol between broker and workers: invalid messages, and the streams on both sides."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import zmq
from tornado.ioloop import IOLoop

from pool_checks import TIMEOUT, workers_of
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.pool import socket_pump as pump_module
from pyams_zmq.pool import worker as worker_module
from pyams_zmq.pool.router_stream import RouterStream
from pyams_zmq.pool.socket_pump import SocketPump
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.pool.worker_stream import ForwardedFrame, WorkerStream
from pyams_zmq.process.connections import Envelope


@contextmanager
def connect_as_worker(pool, route):
    """Open a socket that has the credentials of a worker and sends what the test wants."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.routing_id = route
        socket.plain_username, socket.plain_password = b'worker', b'secret'
        socket.connect(pool.bound_worker_address)
        yield socket


@pytest.mark.parametrize(
    'frames',
    [
        [b''],
        [b'', b'nonsense'],
        [b'', b'STATS'],
        [b'', b'READY', b'nonsense'],
        [b'', b'READY', b'{}'],
        [b'', b'HEARTBEAT', b'nonsense'],
        [b'', b'REJECT', b'12345678'],
        [b'12345678'],
        [b'12345678', b'[200,1]'],
        [b'12345678', b'[200,1]', b'more'],
        [b'x' * 100_000] * 3,
    ],
)
def test_invalid_messages_of_a_worker(pool, ask, frames):
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    with connect_as_worker(process, b'rogue') as socket:
        socket.send_multipart(frames)
        socket.send_multipart([b'', b'HEARTBEAT', b'1'])  # its reply shows that all was read
        assert socket.poll(TIMEOUT * 1000)
        assert socket.recv_multipart() == [b'', b'UNKNOWN']
    assert ask(process, ['echo', 1]) == [200, 1]
    assert len(workers_of(process)) == 1


def test_worker_with_the_routing_id_of_another(pool, ask, monkeypatch):
    """Its READY is ignored."""
    monkeypatch.setattr(worker_module.os, 'urandom', lambda size: b'n' * size)
    process = pool(workers=1, worker_address='127.0.0.1', worker_auth='worker:secret')
    info = {'pid': 1, 'host': 'x', 'slots': 9, 'interval': 60, 'methods': [], 'repeatable': []}
    with connect_as_worker(process, b'n' * 16) as socket:
        socket.send_multipart([b'', b'READY', json.dumps({**info, 'calls': []}).encode()])
        assert ask(process, ['echo', 1]) == [200, 1]
        [worker] = process.stats()['workers']
        assert worker['slots'] == 1


def test_error_of_a_send():
    """An error that is not caused by the peer is raised."""
    stream = RouterStream.__new__(RouterStream)
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as stream.socket,
        pytest.raises(zmq.ZMQError, match='not supported'),
    ):
        stream.send_frames([b'1', b'2'])
    stream.socket = None
    stream._handle_events(None, 0)


def test_turns_of_a_busy_broker(monkeypatch):
    """It polls its sockets once in a turn of the loop, however many events arrive."""
    callbacks = []
    drained = []
    pump = SocketPump(callbacks.append, lambda: drained.append(True))
    stream = RouterStream.__new__(RouterStream)
    stream.socket, stream._broker = SimpleNamespace(closed=False), SimpleNamespace(pump=pump)
    pump.add(stream, int)
    monkeypatch.setattr(pump_module, '_TURN', 0.0)
    monkeypatch.setattr(pump_module.zmq, 'zmq_poll', lambda polled, wait: [(stream, zmq.POLLIN)])
    for _turn in range(3):
        due = callbacks.copy()
        callbacks.clear()
        for callback in due:
            callback()
        pump.run()  # as a heartbeat does
        stream._handle_events(None, 0)
        assert len(callbacks) == 1
    monkeypatch.setattr(pump_module.zmq, 'zmq_poll', lambda polled, wait: [])
    assert drained == []
    callbacks.pop()()
    assert drained == [True]
    stream._handle_events(None, 0)
    assert callbacks == []


def test_closed_stream():
    loop = IOLoop(make_current=False)
    with zmq.Context() as context:
        stream = WorkerStream(context.socket(zmq.DEALER), loop)
        with pytest.raises(zmq.ZMQError, match='no message to reply to'):
            stream.send(b'reply')
        stream.close(0)
        stream._handle_events(None, 0)
    loop.close()


def test_forwarded_frame():
    frame = ForwardedFrame(b'data', b'al\0ice\x00127.0.0.1')
    assert (bytes(frame), len(frame)) == (b'data', 4)
    assert (frame['User-Id'], frame['Peer-Address']) == ('al\0ice', '127.0.0.1')
    with pytest.raises(KeyError):
        frame['other']


def test_ready_without_a_connection():
    """READY does not count as sent, so the worker sends it on the next connection."""
    worker = PoolWorker('127.0.0.1:1', PoolMessageHandler)
    worker._message_handler = None
    worker.rep_stream = SimpleNamespace(pending=set())
    sent = []
    worker.send_command = lambda *frames: bool(sent.append(frames))
    worker.send_ready()
    assert sent
    assert worker._ready_sent < 0


def test_message_of_a_connection_that_is_unknown():
    """Its reply is sent, but not counted."""
    broker = Pool().make_broker(None)
    sent = []
    broker._client_stream = SimpleNamespace(send_frames=sent.append)
    broker._send_reply(Envelope([b'client', b'']), [b'[200,1]'])
    assert sent == [[b'client', b'', b'[200,1]']]
