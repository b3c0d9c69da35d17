# SPDX-License-Identifier: ZPL-2.1
"""Messages of clients through a pool: sizes, frames, users."""

import json
import os
import signal
from functools import partial

import pytest
import zmq

from handlers import FuzzMessageHandler
from pool_checks import (
    TIMEOUT,
    client_of,
    in_threads,
    wait_for_file,
    wait_for_queue,
    wait_for_workers,
    workers_of,
)
from pool_handlers import Pool, PoolMessageHandler
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import (
    ZMQRemoteError,
)


def test_large(pool):
    process = pool(workers=1)
    with client_of(process) as client:
        assert client.call('size', 'x' * 5_000_000) == 5_000_000
        assert len(client.call('big', 20_000_000)) == 20_000_000


def test_too_large(pool, ask):
    process = pool(factory=type('Small', (Pool,), {'max_message_size': 1000}), workers=1)
    assert ask(process, ['size', 'x' * 1000]) == [
        413,
        'Message is 1012 bytes; the limit is 1000',
    ]
    assert ask(process, ['size', 'x' * 988]) == [200, 988]


def test_several_frames(pool):
    process = pool(workers=1)
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(process.bound_address)
        socket.send_multipart([b'1', b'x' * 100_000, b'["many",1]'])
        assert socket.poll(TIMEOUT * 1000)
        assert json.loads(socket.recv()) == [200, 3]


@pytest.mark.parametrize(
    ('frames', 'status'),
    [([b'["echo",1]'], 400), ([b''], 400), ([b'', b''], 400), ([b'', b'["nothing_such",1]'], 404)],
)
def test_malformed(pool, frames, status):
    process = pool(workers=1)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        socket.send_multipart(frames)
        assert socket.poll(TIMEOUT * 1000)
        assert json.loads(socket.recv_multipart()[-1])[0] == status
        socket.send_multipart([b'', b'["echo",1]'])
        assert socket.poll(TIMEOUT * 1000)
        assert json.loads(socket.recv_multipart()[-1]) == [200, 1]


def test_another_json_load(pool, ask):
    process = pool(factory=type('First', (Pool,), {'json_load': 5}), workers=1)
    assert ask(process, ['echo', 1]) == [200, 1]
    assert process.stats()['methods']['(others)']['calls'] == 1


def test_client_is_gone(pool, ask, tmp_path):
    process = pool(workers=1)
    path = tmp_path / 'hold'
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        socket.send_json(['wait_for', str(path)])
        wait_for_file(path)
    path.unlink()
    assert ask(process, ['echo', 1]) == [200, 1]


def test_peer(pool, ask, tmp_path):
    users = tmp_path / 'users'
    users.write_text('alice:a\nbob:b\n')
    process = pool(auth=users)
    assert ask(process, ['who', 1], auth='alice:a') == [200, ['alice', '127.0.0.1', 1]]
    assert ask(process, ['who', 2], auth='bob:b') == [200, ['bob', '127.0.0.1', 2]]
    assert ask(process, ['echo', 2], auth='bob:c')[0] == 401
    with ZMQClient(process.bound_address, auth='bob:b') as bob:
        assert bob.call('echo', 1) == 1
        users.write_text('alice:a\n')
        before = workers_of(process)
        process.reload()
        wait_for_workers(process, before)
        with pytest.raises(ZMQRemoteError, match='401 Your access was withdrawn'):
            bob.call('echo', 2)
    assert ask(process, ['echo', 2], auth='alice:a') == [200, 2]


@pytest.mark.parametrize('auth', [None, 'alice:a'])
def test_handler_without_peers(pool, ask, auth):
    process = pool(handler=FuzzMessageHandler, workers=1, auth=auth)
    assert ask(process, ['echo', 1], auth=auth) == [200, 1]


def test_peer_without_credentials(pool, ask, tmp_path):
    process = pool(f'ipc://{tmp_path}/pool')
    [status, [user, address, _args]] = ask(process, ['who', 1])
    assert (status, user) == (200, 'anonymous')
    assert address == f'localhost:{os.geteuid()}:{os.getegid()}:{os.getpid()}'


def test_peer_of_a_call_that_waited_for_the_first_worker(pool, tmp_path):
    process = pool(workers=1, auth='alice:a')
    path = tmp_path / 'hold'
    with client_of(process, auth='alice:a') as client:
        with in_threads(partial(client.call, 'wait_for'), str(path)):
            wait_for_file(path)
            os.kill(process.stats()['pid'], signal.SIGKILL)
        with in_threads(partial(client.call, 'who', retries=9), 1) as results:
            wait_for_queue(process, 1)
            path.unlink()
        assert results == [['alice', '127.0.0.1', 1]]


class PartsMessageHandler(PoolMessageHandler):
    """Replies in two frames, one after the other."""

    def __call__(self, frames):
        self.rep_stream.send(b'first', zmq.SNDMORE)
        self.rep_stream.send(b'[200,"second"]')


class FramesMessageHandler(PoolMessageHandler):
    """Replies in two frames at once."""

    def __call__(self, frames):
        self.rep_stream.send_multipart([b'first', b'[200,"second"]'])


@pytest.mark.parametrize('handler', [PartsMessageHandler, FramesMessageHandler])
def test_reply_of_two_frames(pool, handler):
    process = pool(handler=handler, workers=1)
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(process.bound_address)
        socket.send(b'')
        assert socket.poll(TIMEOUT * 1000)
        assert socket.recv_multipart() == [b'first', b'[200,"second"]']
