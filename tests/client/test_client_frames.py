# SPDX-License-Identifier: ZPL-2.1
"""Binary frames of all clients, with real services."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import transaction
import zmq

from checks import TIMEOUT, started, wait_until
from frame_handlers import FrameMessageHandler
from handlers import Process
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import (
    ZMQBacklogError,
    ZMQMessageError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.message import MAX_FRAMES, Multipart
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.testing import RecordingClient
from pyams_zmq.transaction import send_on_commit
from pyams_zmq.wire.linger import CLOSE_LINGER
from raw_peer import RawPeer
from transaction_checks import notes

MIB = 1024 * 1024


class Blocking:
    """An AsyncZMQClient with the methods of a ZMQClient."""

    def __init__(self, address, **options):
        self._loop = asyncio.new_event_loop()
        self._client = AsyncZMQClient(address, **options)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._client.close()
        self._loop.close()

    def set(self, name, value):
        setattr(self._client, name, value)

    def call(self, *args, **options):
        return self._loop.run_until_complete(self._client.call(*args, **options))

    def request(self, *args, **options):
        return self._loop.run_until_complete(self._client.request(*args, **options))


class Plain(ZMQClient):
    """A ZMQClient with the method `set` of the other one."""

    set = ZMQClient.__setattr__


@pytest.fixture
def process(start):
    """Process whose methods take and return frames."""
    return start(handler=FrameMessageHandler)


@pytest.fixture(params=[Plain, Blocking])
def make_client(request):
    """Class of a client."""
    return partial(request.param, timeout=TIMEOUT)


@pytest.fixture
def caller(process, make_client):
    """Client of the process, of both classes."""
    with make_client(process.bound_address) as client:
        yield client


# Calls


@pytest.mark.parametrize(
    'name', ['crop', 'async_crop', 'thread_crop', 'future_crop', 'peer_crop', 'request_crop']
)
def test_call(caller, name):
    for _ in range(2):
        assert caller.call(name, 2, frames=[b'picture']) == Multipart(7, [b'pi'])
        assert caller.call('echo', 1) == 1


def test_request(caller):
    assert caller.request(['crop', 2], frames=[b'picture']) == Multipart([200, 7], [b'pi'])
    assert caller.request(['bare', {'a': 1}]) == Multipart({'a': 1}, [b'x'])


def test_each_kind_of_frame(caller):
    frames = [b'ab', bytearray(b'cde'), memoryview(b'.f.g')[1::2], zmq.Frame(b'hijk'), b'']
    assert caller.call('sizes', 'args', frames=frames) == [2, 3, 2, 4, 0, 'args']
    assert caller.call('sizes', 'args', frames=iter(frames)) == [2, 3, 2, 4, 0, 'args']
    assert caller.call('sizes', 'args', frames=None) == ['args']
    assert caller.call('reply', 1) == Multipart(1, [b'bytes', b'bytearray', b'mem', b'frame'])


def test_large_frames(caller):
    picture = bytes(range(256)) * 4096 * 12  # 12 MiB
    size, [copy] = caller.call('crop', len(picture), frames=[picture])
    assert size == len(picture) == 12 * MIB
    assert copy == picture


def test_many_frames(caller):
    frames = [b'%d' % number for number in range(MAX_FRAMES)]
    assert caller.call('mirror', frames=frames) == Multipart(None, frames)
    assert caller.call('many', MAX_FRAMES) == Multipart(MAX_FRAMES, frames)
    with pytest.raises(ValueError, match='more than 1000'):
        caller.call('mirror', frames=[*frames, b''])
    with pytest.raises(ZMQRemoteError, match='500 Internal error'):
        caller.call('many', MAX_FRAMES + 1)
    assert caller.call('echo', 1) == 1


@pytest.mark.parametrize('name', ['text', 'changed', 'nested', 'not_json'])
def test_bad_reply_of_a_method(caller, name):
    with pytest.raises(ZMQRemoteError, match='500 Internal error'):
        caller.call(name)
    assert caller.call('crop', 1, frames=[b'xy']) == Multipart(2, [b'x'])


def test_status_of_an_error(caller):
    with pytest.raises(ZMQRemoteError, match='422 secret') as error:
        caller.call('refuse_frames', frames=[b'x'])
    assert error.value.payload == 'secret'
    assert caller.request(['refuse_frames', 1], frames=[b'x']) == Multipart([422, 'secret'], [b'x'])
    with pytest.raises(ZMQRemoteError, match="missing a required argument: 'size'; it takes crop"):
        caller.call('crop', 1)
    with pytest.raises(ZMQRemoteError, match='404 Unknown'):
        caller.call('unknown', 1, frames=[b'x'])


@pytest.mark.parametrize('frames', ['text', b'bytes', ['text'], [1], 1, [None]])
def test_bad_frames(caller, frames):
    with pytest.raises(TypeError, match='Bad frame'):
        caller.call('sizes', frames=frames)


def test_largest_message(process, caller):
    caller.set('max_message_size', 1000)
    with pytest.raises(ZMQMessageError, match='Message is 1012 bytes; the limit is 1000') as error:
        caller.call('sizes', None, frames=[b'x' * 500, b'x' * 498])
    assert error.value.status == 413
    assert caller.call('sizes', None, frames=[b'x' * 500, b'x' * 486]) == [500, 486, None]
    caller.set('max_message_size', 64 * MIB)
    half = bytes(process.max_message_size // 2)
    with pytest.raises(
        ZMQRemoteError, match='413 Message is 16777230 bytes; the limit is 16777216'
    ):
        caller.call('sizes', None, frames=[half, half])
    assert caller.call('sizes', 1, frames=[half, half[20:]]) == [len(half), len(half) - 20, 1]


@pytest.mark.parametrize('send_deadline', [False, True])
def test_each_attempt_has_all_frames(make_client, send_deadline):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port('tcp://127.0.0.1')
        options = {'timeout': 0.3, 'retries': 2, 'send_deadline': send_deadline}
        with (
            make_client(f'127.0.0.1:{port}', **options) as client,
            pytest.raises(ZMQTimeoutError),
        ):
            client.call('crop', 1, frames=iter([b'a', bytearray(b'b')]))
        for _ in range(3):
            assert server.poll(5000)
            *frames, data = server.recv_multipart()
            assert frames[frames.index(b'') + 1 :] == [b'a', b'b']
            assert len(json.loads(data)) == 2 + send_deadline


def test_service_that_dies_during_the_call(make_client, address, tmp_path):
    """The next process of the supervisor gets all frames again."""
    picture = bytes(range(256)) * 4096
    service = SupervisorProcess({'frames': partial(Process, address, FrameMessageHandler)})
    with started(service), make_client(address, retries=100) as client:
        assert client.call('echo', 1) == 1
        with pytest.raises(ZMQUnreachableError, match='was lost'):
            client.call('die_once', str(tmp_path / 'first'), frames=[picture], retries=0)
        _, frames = client.call('die_once', str(tmp_path / 'second'), frames=[picture])
        assert frames == [picture[::-1]]


def test_reply_of_another_server(make_client):
    """Too many frames, and frames behind an envelope without a delimiter."""

    def serve():
        for number in (MAX_FRAMES + 1, MAX_FRAMES):
            *envelope, _data = server.recv_multipart()
            server.send_multipart([*envelope, *[b''] * number, b'[200,null]'])

    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 1000
        port = server.bind_to_random_port('tcp://127.0.0.1')
        thread = threading.Thread(target=serve)
        thread.start()
        with make_client(f'127.0.0.1:{port}') as client:
            with pytest.raises(ZMQReplyError, match='1001 binary frames; the limit is 1000'):
                client.call('any')
            assert len(client.call('any').frames) == MAX_FRAMES
        thread.join()


def test_connection_lingers_after_many_frames(process, client):
    """With linger 0, libzmq aborts the program if the connection ends when they are half sent."""
    client.call('echo')
    [connection] = client._idle.get()
    assert connection._socket.linger == 0
    for _ in range(2):
        client.call('crop', 1, frames=[b'x'])
        assert connection._socket.linger == CLOSE_LINGER
    assert client._idle.get() == [connection]


# Messages without waiting for the reply


def test_send(process, client):
    frame = bytearray(b'before')
    client.send('note_frames', 1, frames=[frame, b'x'])
    frame[:] = b'after!'
    client.send('note_frames', 2)
    client.post('note_frames', b'["note_frames", 3]', [bytearray(b'y')])
    client.reserve('note_frames', b'["note_frames", 4]', frames=[b'z']).post()
    assert notes(client) == [['before', 'x', 1], [2], ['y', 3], ['z', 4]]


def test_reply_with_frames_is_checked(process, client, errors):
    client.send('note_frames', 1, frames=[b'x'])
    assert notes(client) == [['x', 1]]
    assert errors() == []
    client.send('refuse_frames', 1, frames=[b'x'])
    wait_until(errors)
    assert 'the reply has status 422' in errors()[0]
    assert 'secret' not in errors()[0]


def test_send_on_commit(process, client):
    frame = bytearray(b'before')
    send_on_commit(client, 'note_frames', 1, frames=[frame])
    send_on_commit(client, 'note_frames', 2)
    frame[:] = b'after!'
    assert notes(client) == []
    transaction.commit()
    assert notes(client) == [['before', 1], [2]]
    send_on_commit(client, 'note_frames', 3, frames=[b'x'])
    transaction.abort()
    assert notes(client) == [['before', 1], [2]]


def test_message_of_a_synchronizer(process, client):
    """It has no room yet when the transaction votes."""

    class Late:
        def beforeCompletion(self, txn):  # noqa: N802 - the name of ISynchronizer
            send_on_commit(client, 'note_frames', 1, frames=[b'late'])

        def afterCompletion(self, txn):  # noqa: N802 - the name of ISynchronizer
            """Do nothing."""

        newTransaction = afterCompletion  # noqa: N815 - the name of ISynchronizer

    client.prepare()
    late = Late()
    transaction.manager.registerSynch(late)
    try:
        transaction.begin()
        transaction.commit()
    finally:
        transaction.manager.unregisterSynch(late)
    assert notes(client) == [['late', 1]]


class Sender:
    """A client of others, which has no `reserve_all`."""

    def __init__(self):
        self.posted = []

    def prepare(self, *, timeout):
        """Do nothing."""

    def post(self, *message):
        self.posted.append(message)


def test_sender_of_others():
    sender = Sender()
    send_on_commit(sender, 'a', 1)
    send_on_commit(sender, 'b', 2, frames=[bytearray(b'x')])
    transaction.commit()
    assert sender.posted == [('a', b'["a",1]'), ('b', b'["b",2]', [b'x'])]


@pytest.mark.parametrize('frames', ['text', b'bytes', ['text'], 1])
def test_bad_frames_of_a_message(client, frames):
    for method in (
        client.send,
        partial(send_on_commit, client),
        lambda name, frames: client.post(name, b'', frames),
        lambda name, frames: client.reserve(name, b'', frames=frames),
        lambda name, frames: client.reserve_all([(name, b'', frames)]),
    ):
        with pytest.raises(TypeError, match='Bad frame'):
            method('note', frames=frames)
    assert len(client._queue.get()) == 0


@contextmanager
def held(start):
    """A client whose service does not reply, with a backlog of 10 000 bytes."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with ZMQClient(f'127.0.0.1:{port}') as client:
            client.max_backlog_size = 10_000
            yield client, server


def test_frames_count_for_the_backlog(start, errors):
    with held(start) as (client, server):
        client.send('note', 1, frames=[bytes(4000), bytes(5000)])
        queue = client._queue.get()
        assert queue.size == 9010
        with pytest.raises(ZMQBacklogError, match='1 messages of 9010 bytes wait in it'):
            client.reserve('note', b'["note",1]', frames=[bytes(1000)])
        client.reserve('note', b'["note",1]', frames=[bytes(900)]).cancel()
        assert queue.size == 9010
        client.max_message_size = 100
        with pytest.raises(ZMQMessageError, match='the limit is 100'):
            client.send('note', 1, frames=[bytes(91)])
        assert server.poll(TIMEOUT * 1000)
        *envelope, _, _, _ = server.recv_multipart()
        server.send_multipart([*envelope, b'[200,null]'])
        wait_until(lambda: not len(queue))
        assert queue.size == 0
    assert errors() == []


def test_refused_message_is_sent_again_with_its_frames(start):
    with held(start) as (client, server):
        client.send('note', 1, frames=[b'x', b'y'])
        for reply in (b'[503,"overloaded"]', b'[200,null]'):
            assert server.poll(TIMEOUT * 1000)
            frames = server.recv_multipart()
            assert frames[-3:] == [b'x', b'y', b'["note",1]']
            server.send_multipart([*frames[:-3], reply])
        wait_until(lambda: not len(client._queue.get()))


def test_window_counts_frames(start, monkeypatch):
    """A second message waits while the first one fills the window."""
    monkeypatch.setattr('pyams_zmq.client.unanswered.WINDOW_SIZE', 1000)
    with held(start) as (client, server):
        for number in (1, 2):
            client.send('note', number, frames=[bytes(900)])
        for number in (1, 2):
            assert server.poll(TIMEOUT * 1000)
            *envelope, _frame, data = server.recv_multipart()
            assert json.loads(data) == ['note', number]
            assert not server.poll(50)
            server.send_multipart([*envelope, b'[200,null]'])
        wait_until(lambda: not len(client._queue.get()))


def test_late_messages_drop_their_frames(monkeypatch, start):
    """The data of late messages is limited, with their frames."""
    monkeypatch.setattr('pyams_zmq.client.unanswered.PATIENCE', 0.05)
    monkeypatch.setattr('pyams_zmq.client.send_queue.PATIENCE', 0.05)
    monkeypatch.setattr('pyams_zmq.client.unanswered.MAX_LATE_SIZE', 100)
    with held(start) as (client, server):
        client.send('note', 1, frames=[bytes(200)])
        first = server.recv_multipart()
        client.send('note', 2)
        *envelope, _data = server.recv_multipart()
        server.send_multipart([*envelope, b'[200,null]'])
        queue = client._queue.get()
        wait_until(lambda: queue._sent._late)
        [message] = wait_until(
            lambda: [late for late in queue._sent._late.values() if late.is_dropped]
        )
        assert (message.frames, message.data, message.size) == ((), b'', 0)
        server.send_multipart([*first[:-2], b'[200,null]'])
        wait_until(lambda: not queue._sent._late)
        assert (queue.size, queue._sent._late_size) == (0, 0)


# Sockets


def test_socket(process):
    with zmq_socket(process.bound_address) as socket:
        socket.send_multipart([b'picture', b'["crop",2]'])
        assert zmq_response(socket) == Multipart([200, 7], [b'pi'])
        socket.send_multipart([b'ab', b'c', b'["sizes",2]'])
        assert zmq_response(socket) == [200, [2, 1, 2]]
        socket.max_message_size = 20
        with pytest.raises(ZMQMessageError, match='Message is 24 bytes; the limit is 20'):
            socket.send_multipart([b'picture', b'picture', b'["crop",2]'])
        socket.send_multipart([b'picture', b'["crop",2]'])
        assert zmq_response(socket) == Multipart([200, 7], [b'pi'])


def test_socket_with_an_envelope(process):
    """Only a REQ socket knows where the reply begins."""
    with zmq_socket(process.bound_address, zmq.DEALER) as socket:
        socket.send_multipart([b'id', b'', b'["echo",2]'])
        assert zmq_response(socket) == [200, 2]
        socket.send_multipart([b'', b'picture', b'["crop",2]'])
        assert zmq_response(socket) == [200, 7]


def test_bare_socket(process):
    """As a client of 2.0.0, which knows nothing of this."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.connect(process.bound_address)
        socket.send_multipart([b'ab', b'c', b'["sizes",2]'])
        assert socket.recv_json() == [200, [2, 1, 2]]
        assert not socket.rcvmore


def test_too_many_frames(process, client):
    with RawPeer(process.bound_address) as peer:
        peer.send(b'\1\0' * 1002 + b'\0\x0a["sizes",1]'[:2] + b'["sizes",1'[:10])
        assert peer.read_reply() == [400, 'Bad message of 1002 frames; the limit is 1001']
        assert peer.ask('echo', 1) == [200, 1]
    assert client.call('echo', 1) == 1


# Many at once, and the double


def test_calls_at_once(process, client):
    def crop(number):
        picture = b'%d' % number * 1000
        return client.call('crop', 10, frames=[picture]) == Multipart(len(picture), [picture[:10]])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(crop, range(400)))


def test_recording_client():
    client = RecordingClient('any', replies={'crop': Multipart([200, 1], [b'x'])})
    assert client.call('crop', 2, frames=[bytearray(b'abc')]) == Multipart(1, [b'x'])
    client.send('crop', frames=[b'd'])
    client.reserve('crop', b'["crop",1]', frames=[b'e']).post()
    send_on_commit(client, 'crop', frames=[b'f'])
    transaction.commit()
    assert [sent.frames for sent in client.outbox] == [[b'abc'], [b'd'], [b'e'], [b'f']]
    client.max_message_size = 10
    for method in (client.call, client.send, partial(send_on_commit, client)):
        with pytest.raises(ZMQMessageError, match='the limit is 10'):
            method('a', frames=[b'1234'])
        with pytest.raises(TypeError, match='Bad frame'):
            method('a', frames=['1234'])
