# SPDX-License-Identifier: ZPL-2.1
"""A ZMQStream loses no message, although any access to its socket clears its wake-up."""

import asyncio
import select
from contextlib import suppress

import pytest
import zmq

from checks import until, wait_until
from pyams_zmq.process.stream import CHECKED_MESSAGES, ZMQStream
from streams import BURST, in_loop, receive


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
async def test_other_error_of_a_socket(net):
    """It is raised to the exception handler of the loop."""

    def fail():
        raise zmq.ZMQError(zmq.EFAULT)

    with net.stream(zmq.PULL, print, socket_class=RacingSocket) as (subject, _address):
        subject.socket.hook_of_recv = fail
        with pytest.raises(zmq.ZMQError, match='Bad address'):
            subject._handle_events(None, 0)
        subject.socket.hook_of_recv = None
