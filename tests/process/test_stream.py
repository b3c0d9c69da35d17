# SPDX-License-Identifier: ZPL-2.1
"""A ZMQStream that sends at once, loses no wake-up and survives failing callbacks."""

import asyncio
import functools
import os
import select
from contextlib import contextmanager, suppress

import pytest
import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

from checks import wait_until
from handlers import RawProcess
from pyams_zmq.auth import Access
from pyams_zmq.process.connections import Listener
from pyams_zmq.process.reply_stream import ReplyStream
from pyams_zmq.process.stream import CHECKED_MESSAGES, ZMQStream

BURST = 200


class CallbackError(Exception):
    """Raised by the callbacks."""


def in_loop(test):
    """Run an `async def` test in a loop of its own; failing callbacks may be logged."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


class Net:
    """Sockets of a test, which are closed at its end."""

    def __init__(self):
        self.context = zmq.Context()
        self.sockets = []

    def socket(self, sock_type, socket_class=zmq.Socket, **options):
        socket = self.context.socket(sock_type, socket_class=socket_class)
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        self.sockets.append(socket)
        return socket

    def connect(self, sock_type, address, **options):
        socket = self.socket(sock_type, **options)
        socket.connect(address)
        return socket

    @contextmanager
    def stream(self, sock_type, callback=None, address='tcp://127.0.0.1:0', **options):
        """Yield a bound stream and its address."""
        is_reply = sock_type == zmq.REP
        socket = self.socket(zmq.ROUTER if is_reply else sock_type, **options)
        socket.bind(address)
        subject = ReplyStream(socket) if is_reply else ZMQStream(socket)
        if callback is not None:
            subject.on_recv(callback)
        try:
            yield subject, socket.last_endpoint.decode()
        finally:
            subject.close()


@pytest.fixture
def net():
    """Sockets of a test."""
    net = Net()
    yield net
    net.context.destroy(0)  # monitors too


async def until(condition):
    """Run the loop until a condition is met; `in_loop` has the deadline."""
    while not condition():
        await asyncio.sleep(0.001)


async def receive(socket, number):
    """Receive messages while the loop runs."""
    messages = []
    while len(messages) < number:
        if socket.poll(0):
            messages.append(socket.recv_multipart())
        else:
            await asyncio.sleep(0.001)
    return messages


@in_loop
async def test_send_is_immediate(net):
    with net.stream(zmq.REP) as (subject, address):
        received = []
        subject.on_recv(received.append)
        client = net.connect(zmq.REQ, address)
        client.send(b'question')
        await until(lambda: received)
        assert received == [[b'question']]
        subject.send(b'answer')
        assert client.poll(5000)  # the loop has not run meanwhile
        assert client.recv() == b'answer'


@in_loop
async def test_size_of_a_message(net):
    """It is that of `Listener.measure`."""
    messages = [[b'', b'x' * 255], [b'', b'x' * 256], [b'id', b'', b'x', b'y' * 1000], [b'text']]
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(lambda _msg: subject.send(b'answer'))
        sizes = []
        subject.listener = listener = Listener(address, None, Access())
        listener.count_received = lambda _frame, size: sizes.append(size)
        client = net.connect(zmq.DEALER, address)
        for frames in messages:
            client.send_multipart(frames)
        await until(lambda: len(sizes) == len(messages))
        assert sizes == [listener.measure(frames) for frames in messages]


@in_loop
async def test_second_reply_is_an_error(net):
    with net.stream(zmq.REP) as (subject, _address):
        with pytest.raises(zmq.ZMQError, match='no message to reply to'):
            subject.send(b'nobody asked')
        assert not subject.sending()


@in_loop
async def test_send_on_a_closed_stream(net):
    with net.stream(zmq.REP) as (subject, _address):
        subject.close()
        with pytest.raises(OSError, match='Stream is closed'):
            subject.send(b'too late')
        assert not subject.readable()


@in_loop
async def test_send_waits_for_a_peer(net):
    with net.stream(zmq.PUSH) as (subject, address):
        sent = []
        subject.on_send(lambda frames, status: sent.append((frames, status)))
        for number in range(BURST):
            subject.send(b'%d' % number)
        assert subject.sending()
        assert not sent
        client = net.connect(zmq.PULL, address)
        messages = await receive(client, BURST)
        assert messages == [[b'%d' % number] for number in range(BURST)]
        await until(lambda: len(sent) == BURST)
        assert sent == [(message, None) for message in messages]
        assert not subject.sending()


@in_loop
async def test_send_waits_for_a_full_peer(net):
    payload = b'x' * 1_000_000
    with net.stream(zmq.PUSH, sndhwm=1) as (subject, address):
        client = net.connect(zmq.PULL, address, rcvhwm=1)
        for number in range(50):
            subject.send_multipart([b'%d' % number, payload])
        assert subject.sending()
        messages = await receive(client, 50)
        assert [int(number) for number, _payload in messages] == list(range(50))


@in_loop
async def test_queued_message_that_can_never_be_sent(net, caplog):
    results = []
    with net.stream(zmq.ROUTER, router_mandatory=1) as (subject, address):
        client = net.connect(zmq.DEALER, address, routing_id=b'client')
        client.send(b'x')
        assert subject.socket.poll(5000)
        subject.on_send(lambda frames, status: results.append(status))
        for name in (b'nobody', b'client'):
            BaseZMQStream.send_multipart(subject, [name, b'x'])  # it queues
        await until(lambda: len(results) == 2)
        assert isinstance(results[0], zmq.ZMQError)
        assert results[1] is None
        assert await receive(client, 1) == [[b'x']]


@in_loop
async def test_on_send(net):
    with net.stream(zmq.PUSH) as (subject, address):
        client = net.connect(zmq.PULL, address)
        await until(lambda: subject.socket.poll(0, zmq.POLLOUT))
        calls = []
        subject.send(b'nobody looks')
        subject.on_send(lambda frames, status: calls.append(frames))
        subject.send(b'1')
        subject.send(b'2', callback=lambda frames, status: calls.append((frames, status)))
        await receive(client, 3)
        await until(lambda: len(calls) == 2)
        assert calls == [[b'1'], ([b'2'], None)]


@in_loop
async def test_on_send_that_sends_the_next(net):
    with net.stream(zmq.PUSH) as (subject, address):
        client = net.connect(zmq.PULL, address)
        await until(lambda: subject.socket.poll(0, zmq.POLLOUT))
        numbers = iter(range(3_000))
        subject.on_send(lambda frames, status: subject.send(b'%d' % next(numbers, -1)))
        subject.send(b'start')
        assert len(await receive(client, 2_000)) == 2_000


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


@in_loop
async def test_readable(net):
    with net.stream(zmq.REP) as (subject, address):
        assert not subject.readable()
        client = net.connect(zmq.REQ, address)
        client.send(b'x')
        await until(subject.readable)
        assert subject.readable()
        received = []
        subject.on_recv(received.append)
        await until(lambda: received)
        assert not subject.readable()


@in_loop
async def test_readable_loses_no_message(net):
    received = []
    with net.stream(zmq.PULL, received.append) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        for number in range(BURST):
            client.send(b'x')
            subject.readable()
            if number % 10 == 0:
                await asyncio.sleep(0)  # lets the stream handle some
        await until(lambda: len(received) == BURST)


class RacingSocket(zmq.Socket):
    """A socket with a hook after its events were read, and before a recv."""

    hook = None
    hook_of_recv = None

    def get(self, option):
        value = super().get(option)
        if option == zmq.EVENTS and self.hook is not None:
            hook, self.hook = self.hook, None
            hook()
        return value

    def recv(self, *args, **kwargs):
        if self.hook_of_recv is not None:
            self.hook_of_recv()
        return super().recv(*args, **kwargs)


@pytest.mark.parametrize(
    'look', [ZMQStream.readable, lambda subject: subject.send(b'x')], ids=['readable', 'send']
)
@in_loop
async def test_message_after_the_events_were_read(net, look):
    received = []
    with net.stream(zmq.DEALER, received.append, socket_class=RacingSocket, sndhwm=1) as (
        subject,
        address,
    ):
        client = net.connect(zmq.DEALER, address)
        client.send(b'first')
        await until(lambda: received)
        for _ in range(10):
            await asyncio.sleep(0)  # until the stream has nothing to do

        def come_in():
            client.send(b'second')
            assert select.select([subject.socket.FD], [], [], 5)[0]

        subject.socket.hook = come_in
        look(subject)
        await until(lambda: len(received) == 2)


@in_loop
async def test_send_that_fails_loses_no_message(net):
    received = []
    with net.stream(zmq.ROUTER, received.append, router_mandatory=1) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send(b'first')
        await until(lambda: received)
        for _ in range(10):
            await asyncio.sleep(0)  # until the stream has nothing to do
        client.send(b'second')
        assert select.select([subject.socket.FD], [], [], 5)[0]
        client.poll(10)  # libzmq reads its commands again some milliseconds after the last time
        with pytest.raises(zmq.ZMQError, match='Host unreachable'):
            subject.send_multipart([b'nobody', b'x'])
        await until(lambda: len(received) == 2)


@in_loop
async def test_message_that_was_received_elsewhere(net):
    received, taken = [], []
    with net.stream(zmq.PULL, received.append, socket_class=RacingSocket) as (subject, address):
        client = net.connect(zmq.PUSH, address)

        def take():
            with suppress(zmq.Again):
                taken.append(zmq.Socket.recv(subject.socket, zmq.NOBLOCK))
                subject.socket.hook_of_recv = None

        subject.socket.hook_of_recv = take
        client.send(b'1')
        await until(lambda: taken)
        client.send(b'2')
        await until(lambda: received)
    assert taken == [b'1']
    assert received == [[b'2']]


@in_loop
async def test_peer_that_disconnects_before_the_send(net):
    with net.stream(zmq.PUSH, socket_class=RacingSocket, sndtimeo=2000) as (subject, address):
        subject.send(b'queued')
        client = net.connect(zmq.PULL, address)
        poller = zmq.Poller()
        poller.register(subject.socket.FD, zmq.POLLIN)
        left = []

        def leave():
            if not subject.socket.EVENTS & zmq.POLLOUT:
                subject.socket.hook = leave
                return
            client.close()
            wait_until(lambda: not subject.socket.EVENTS & zmq.POLLOUT)
            left.append(True)

        while not left:
            subject.socket.hook = leave
            await asyncio.sleep(0.001)  # a poll, with the deadline of `in_loop`
            subject._handle_events(subject.socket, 0)
        assert subject.sending()
        assert await receive(net.connect(zmq.PULL, address), 1) == [[b'queued']]


@in_loop
async def test_readable_loses_no_queued_send(net):
    with net.stream(zmq.PUSH) as (subject, address):
        subject.send(b'queued')
        client = net.connect(zmq.PULL, address)
        for _ in range(100):  # the peer connects at any of these moments
            assert not subject.readable()
            client.poll(1)
        assert await receive(client, 1) == [[b'queued']]


@pytest.mark.parametrize('sock_type', [zmq.REP, zmq.PULL])
@in_loop
async def test_others_are_served(net, sock_type):
    received = []
    with net.stream(sock_type) as (subject, address):

        def take(frames):
            received.append(frames)
            if sock_type == zmq.REP:
                subject.send(b'x')

        client = net.connect(zmq.DEALER if sock_type == zmq.REP else zmq.PUSH, address)
        for _ in range(BURST):
            client.send_multipart([b'', b'x'])
        await until(subject.readable)
        subject.time_slice = 0
        subject.on_recv(take)
        most = 0
        while len(received) < BURST:
            before = len(received)
            await asyncio.sleep(0)  # one iteration of the loop
            most = max(most, len(received) - before)
        assert most <= 2


@in_loop
async def test_waiting_messages_are_handled_together(net):
    received = []
    with net.stream(zmq.PULL, address='inproc://burst') as (subject, address):
        client = net.connect(zmq.PUSH, address)
        for _ in range(BURST):
            client.send(b'x')
        subject.time_slice = 10
        subject.on_recv(received.append)
        await asyncio.sleep(0)  # one iteration of the loop
        assert len(received) == BURST


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
async def test_refusal_of_what_waits(net):
    """Each message gets a reply, one without a delimiter the usual one."""
    received = []
    with net.stream(zmq.REP, received.append) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        for message in ([b'no delimiter'], [b'', b'one'], [b'', b'two']):
            client.send_multipart(message)
        replies = []
        while len(replies) < 3:  # the loop does not run
            subject.refuse_waiting(b'refused')
            if client.poll(10):
                replies.append(client.recv_multipart())
    assert replies == [[subject.no_delimiter_reply], [b'', b'refused'], [b'', b'refused']]
    assert not received


@in_loop
async def test_stream_without_a_callback_is_left_alone(net):
    with net.stream(zmq.PULL) as (subject, address):
        subject.on_recv(None)
        client = net.connect(zmq.PUSH, address)
        client.send(b'x')
        await until(subject.readable)
        await asyncio.sleep(0)  # for a recv of the stream, which must not happen
        assert subject.socket.recv(zmq.NOBLOCK) == b'x'


@in_loop
async def test_flush(net):
    received = []
    with net.stream(zmq.PULL, received.append) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        for _ in range(10):
            client.send(b'x')
        while len(received) < 10:
            subject.flush()
        assert not subject.sending()
    with net.stream(zmq.PUSH) as (subject, address):
        subject.send(b'x')
        client = net.connect(zmq.PULL, address)
        while subject.sending():
            subject.flush()
        assert client.recv() == b'x'


@in_loop
async def test_flush_without_a_callback_drops_messages(net):
    with net.stream(zmq.PULL) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        client.send(b'x')
        await until(subject.readable)
        assert subject.flush() == 1
        assert not subject.readable()
    with net.stream(zmq.REP) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'unwanted'])
        await until(subject.readable)
        subject.flush()
        subject.on_recv(subject.send_multipart)
        client.send_multipart([b'', b'x'])
        assert await receive(client, 2) == [[b'', b'[500,"Internal error"]'], [b'', b'x']]


@in_loop
async def test_flush_stops_at_its_limit(net):
    received = []
    with net.stream(zmq.PULL, received.append) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        client.send(b'1')
        client.send(b'2')
        while not subject.flush(limit=1):
            pass
        assert received == [[b'1']]
        await until(lambda: received == [[b'1'], [b'2']])


@in_loop
async def test_flush_stops_at_a_message_that_needs_a_reply(net):
    received = []
    with net.stream(zmq.REP, received.append) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'1'])
        client.send_multipart([b'', b'2'])
        await until(lambda: received and subject.readable())
        assert subject.flush() == 0
        assert received == [[b'1']]
        subject.send(b'x')
        await until(lambda: len(received) == 2)


@pytest.mark.parametrize('frames', [[b'x'], [b'x', b'y'], [b'x'] * 1000])
@in_loop
async def test_no_delimiter(net, frames):
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(subject.send_multipart)
        client = net.connect(zmq.DEALER, address)
        for number in range(BURST):
            client.send_multipart(frames)
            client.send_multipart([b'', b'%d' % number])
        answer = b'[400,"Bad message: no delimiter, an empty frame, before the request"]'
        assert await receive(client, 2 * BURST) == [
            reply for number in range(BURST) for reply in ([answer], [b'', b'%d' % number])
        ]


@in_loop
async def test_reply_in_parts(net):
    with net.stream(zmq.REP) as (subject, address):

        def reply(frames):
            subject.send(b'1', zmq.SNDMORE)
            subject.send_multipart([b'2', b'3'], zmq.SNDMORE)
            subject.send(b'4')

        subject.on_recv(reply)
        client = net.connect(zmq.REQ, address)
        client.send(b'x')
        assert await receive(client, 1) == [[b'1', b'2', b'3', b'4']]


@in_loop
async def test_frames_that_are_not_copied(net):
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(lambda frames: subject.send(frames[0].bytes), copy=False)
        client = net.connect(zmq.REQ, address)
        client.send(b'x')
        assert await receive(client, 1) == [[b'x']]


@in_loop
async def test_reply_of_a_wrong_type(net, caplog):
    with net.stream(zmq.REP, lambda frames: subject.send('text')) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        for _ in range(10):
            client.send_multipart([b'', b'x'])
        assert await receive(client, 10) == [[b'', b'[500,"Internal error"]']] * 10
    assert 'TypeError' in caplog.text


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


def test_close_after_the_loop(net, caplog):
    async def make():
        return ZMQStream(net.socket(zmq.PULL))

    subject = asyncio.run(make())
    socket = subject.socket
    subject.close()
    assert socket.closed
    assert not caplog.records


def test_process_whose_stream_was_closed(start, ask, tmp_path):
    """It does not become deaf without a record in the log; other streams serve on."""
    log = tmp_path / 'log'
    process = start(log, factory=RawProcess)
    assert ask(process, ['close_raw', None])[0] == 200
    wait_until(lambda: 'ends: other code has closed its socket' in log.read_text())
    assert 'The ROUTER stream tcp://127.0.0.1:' in log.read_text()
    assert ask(process, ['echo', 1]) == [200, 1]


@pytest.mark.parametrize('is_bound', [True, False])
@in_loop
async def test_req_queues_requests(net, is_bound):
    """It sends the next one after the reply to the last one, as the stream of pyzmq does."""
    replies = []
    other = net.socket(zmq.REP)
    socket = net.socket(zmq.REQ)
    listener, connecting = (socket, other) if is_bound else (other, socket)
    connecting.connect(f'tcp://127.0.0.1:{listener.bind_to_random_port("tcp://127.0.0.1")}')
    subject = ZMQStream(socket)
    subject.on_recv(lambda msg: replies.append(msg[0]))
    for number in range(3):
        subject.send_multipart([b'%d' % number, b'part'])
    assert subject.sending()
    for number in range(3):
        [[question, _part]] = await receive(other, 1)
        assert question == b'%d' % number
        assert len(replies) == number
        await asyncio.sleep(0.01)  # measures time: no event shows that a request does not come
        assert not other.poll(0)
        other.send(b'reply to ' + question)
    await until(lambda: len(replies) == 3)
    assert replies == [b'reply to 0', b'reply to 1', b'reply to 2']
    assert not subject.sending()
    subject.close()


@in_loop
async def test_close_with_messages_waiting(net, caplog):
    with net.stream(zmq.PULL, print) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        client.send(b'x')
        wait_until(subject.readable)
        subject.close()
        await asyncio.sleep(0)  # the loop runs what the stream has scheduled
    assert not caplog.records


@in_loop
async def test_stop_on_send(net):
    calls = []
    with net.stream(zmq.PUSH) as (subject, address):
        subject.send(b'x', callback=lambda *args: calls.append(args))
        subject.stop_on_send()
        assert await receive(net.connect(zmq.PULL, address), 1) == [[b'x']]
    assert not calls


@pytest.mark.parametrize(
    'number',
    [1, CHECKED_MESSAGES - 1, CHECKED_MESSAGES, CHECKED_MESSAGES + 1, 3 * CHECKED_MESSAGES],
)
@in_loop
async def test_messages_after_any_number(net, number):
    """In each case the next messages wake the stream."""
    received = []
    with net.stream(zmq.PULL, received.append) as (_subject, address):
        client = net.connect(zmq.PUSH, address)
        for _ in range(5):
            received.clear()
            for _ in range(number):
                client.send(b'')
            await until(lambda: len(received) == number)


@in_loop
async def test_burst(net):
    """No wake-up is lost if messages arrive while another one is handled."""
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(lambda frames: subject.send(frames[0]))
        clients = [net.connect(zmq.DEALER, address) for _ in range(20)]
        for number in range(BURST):
            for client in clients:
                client.send_multipart([b'', b'%d' % number])
        expected = [[b'', b'%d' % number] for number in range(BURST)]
        for client in clients:
            assert await receive(client, BURST) == expected


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


@pytest.mark.parametrize('part', ['text', 1, None])
@in_loop
async def test_part_that_cannot_be_sent(net, part, caplog):
    """It raises at once, and leaves no half reply for the next peer."""
    with net.stream(zmq.REP) as (subject, address):

        def answer(frames):
            if frames == [b'bad']:
                subject.send(part, zmq.SNDMORE)
            subject.send(b'good')

        subject.on_recv(answer)
        for question, reply in ((b'bad', b'[500,"Internal error"]'), (b'good', b'good')):
            client = net.connect(zmq.REQ, address)
            client.send(question)
            assert await receive(client, 1) == [[reply]]
    assert 'A callback failed' in caplog.text


@in_loop
async def test_event_when_a_req_has_to_send(net, caplog):
    """A REQ socket may not receive then; this is not logged as an error."""
    with net.stream(zmq.REQ) as (subject, address):
        heard = []
        subject.on_recv(heard.append)
        peer = net.connect(zmq.REP, address)
        await until(lambda: subject.socket.get(zmq.EVENTS) & zmq.POLLOUT)
        subject.send(b'question')
        assert await receive(peer, 1) == [[b'question']]
        peer.send(b'answer')
        await until(lambda: heard)
        peer.close()  # the descriptor becomes readable without a message
        await until(lambda: not subject.socket.get(zmq.EVENTS) & zmq.POLLOUT)
        subject._handle_events(None, 0)
    assert heard == [[b'answer']]
    assert not caplog.records


@in_loop
async def test_bad_message_behind_one_that_waits(net, caplog):
    with net.stream(zmq.PUSH) as (subject, address):
        for message in (b'one', 'two', b'three'):
            subject.send(message)
        client = net.connect(zmq.PULL, address)
        assert await receive(client, 2) == [[b'one'], [b'three']]
    assert len(caplog.records) == 1
    assert 'A message cannot be sent' in caplog.text


@in_loop
async def test_flush_of_a_stream_that_its_callback_closes(net):
    with net.stream(zmq.PULL) as (subject, address):
        client = net.connect(zmq.PUSH, address)
        for _ in range(2):
            client.send(b'message')
        await until(subject.readable)
        subject.on_recv(lambda _frames: subject.close())
        assert subject.flush() == 1
        assert subject.closed()


@in_loop
async def test_detach(net):
    with net.stream(zmq.REP) as (subject, address):
        with pytest.raises(zmq.ZMQError, match='There is no message to reply to') as raised:
            subject.detach()
        assert raised.value.errno == zmq.EFSM
        replies = []
        subject.on_recv(lambda _frames: replies.append(subject.detach()))
        client = net.connect(zmq.REQ, address)
        client.send(b'question')
        await until(lambda: replies)
        subject.close()
        send, end = replies[0]
        send(b'too late')
        end()
        assert subject.in_hand == 0
        for change in (1, -1):
            subject.count_overdue(change)
        assert subject.overdue == 0


@in_loop
async def test_other_error_of_a_socket(net):
    """It is raised to the exception handler of the loop."""

    def fail():
        raise zmq.ZMQError(zmq.EFAULT)

    with net.stream(zmq.PULL, print, socket_class=RacingSocket) as (subject, _address):
        subject.socket.hook_of_recv = fail
        with pytest.raises(zmq.ZMQError, match='Bad address'):
            subject._handle_events(None, 0)
        subject.socket.hook_of_recv = None
