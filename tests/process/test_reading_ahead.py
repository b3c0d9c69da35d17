# SPDX-License-Identifier: ZPL-2.1
"""A stream that reads messages ahead: its limits, and its recovery."""

import asyncio
import threading

import pytest
import zmq

from checks import TIMEOUT, until, wait_until
from pyams_zmq.auth import AccessPolicy
from pyams_zmq.handler.turn import Turn
from pyams_zmq.process import waiting as waiting_module
from pyams_zmq.process.attendant import Attendant
from pyams_zmq.process.connections import Listener
from pyams_zmq.wire.clock import monotonic
from streams import in_loop, receive


@in_loop
async def test_limit(net, monkeypatch):
    """Beyond the limit, a peer that comes late is heard, until there are twice as many messages."""
    monkeypatch.setattr(waiting_module, 'MAX_WAITING', 20)
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(lambda _msg: None)  # it never replies
        asked = []

        def answer(name, _frame):
            asked.append(name)
            return b'[200,null]'

        subject.answer = answer
        client = net.connect(zmq.DEALER, address)
        for number in range(100):
            client.send_multipart([b'', b'%d' % number])
        await until(lambda: subject.waiting.is_full)
        other = net.connect(zmq.DEALER, address)
        other.send_multipart([b'', b'["pyams_zmq.ping",null]'])
        assert await receive(other, 1) == [[b'', b'[200,null]']]
        assert asked == [b'pyams_zmq.ping']

        while not subject.waiting.is_overfull:
            late = net.connect(zmq.DEALER, address)
            count = subject.waiting.count
            late.send_multipart([b'', b'late'])
            await until(lambda count=count: subject.waiting.count > count)
        assert subject.waiting.count == 40
        assert not subject._may_read()
        assert subject.readable()


@in_loop
async def test_reading_ahead_has_an_end(net):
    with net.stream(zmq.REP) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        await until(subject.readable)
        assert not subject.read_ahead(monotonic() - 1)
        assert subject.waiting.count == 0
        assert subject.read_ahead(monotonic() + TIMEOUT)
        assert subject.waiting.count == 1
        subject.close()
        assert not subject.read_ahead(monotonic() + TIMEOUT)


@in_loop
async def test_flush_of_many_messages(net, monkeypatch):
    """It ends at the limit, although messages wait in the socket."""
    monkeypatch.setattr(waiting_module, 'MAX_WAITING', 20)
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(lambda _msg: None)  # it never replies
        client = net.connect(zmq.DEALER, address)
        for number in range(100):
            client.send_multipart([b'', b'%d' % number])
        await until(lambda: subject.waiting.is_full)
        assert subject.flush() == 0


@in_loop
async def test_socket_is_not_drained_at_the_limit(net, monkeypatch):
    """Else a peer whose messages wait in it would seem to have sent a part of a message only."""
    monkeypatch.setattr(waiting_module, 'MAX_WAITING', 20)
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(lambda _msg: None)  # it never replies
        client = net.connect(zmq.DEALER, address)
        for number in range(100):
            client.send_multipart([b'', b'%d' % number])
        await until(lambda: subject.waiting.is_full)
        subject.listener = Listener(address, None, AccessPolicy({}, ()))
        net.connect(zmq.DEALER, address).send_multipart([b'', b'x'])
        await until(lambda: subject.waiting.count > 20)
        await asyncio.sleep(0)  # the end of this turn of the loop
        assert subject.listener.drained == 0


@in_loop
async def test_recovery_without_an_attendant(net):
    with net.stream(zmq.REP) as (subject, address):
        subject.on_recv(subject.send_multipart)
        subject.recover()
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        assert await receive(client, 1) == [[b'', b'x']]


@in_loop
async def test_recovery_of_the_turn(net):
    """A signal handler may raise between the end of a method and the next step."""
    with net.stream(zmq.REP) as (subject, _address):
        subject.turn = Turn()
        subject.turn.is_free = True
        subject.recover()
        assert not subject.turn.take()


@pytest.fixture
def attendant():
    """An attendant, which is started and stopped at the end."""
    attendant = Attendant(lambda: None)
    yield attendant
    attendant.start()
    attendant.stop()


@in_loop
async def test_attendant(net, attendant):
    with net.stream(zmq.REP) as (subject, address):
        attendant.attend(subject)
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        subject.received += 1
        assert attendant.step()
        assert not attendant.step()  # the loop has the turn
        assert subject.waiting.count == 0
        subject.turn.is_free = True
        assert wait_until(attendant.step, TIMEOUT)
        assert subject.waiting.count == 1
        assert not attendant.step()
        subject.turn.is_free = False


@in_loop
async def test_attendant_of_several_streams(net, attendant):
    """It reads all of them while a method of one runs; it tells the loop of the others."""
    received = []
    with net.stream(zmq.REP) as (first, _), net.stream(zmq.REP) as (subject, address):
        subject.on_recv(received.append)
        attendant.attend(first)
        attendant.attend(subject)
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        first.turn.is_free = True
        assert wait_until(attendant.step, TIMEOUT)  # without a turn of the loop
        first.turn.is_free = False
        assert not received
        await until(lambda: received)


@in_loop
async def test_attendant_forgets_closed_streams(net, attendant):
    with net.stream(zmq.REP) as (first, _), net.stream(zmq.REP) as (second, _):
        attendant.attend(first)
        first.close()
        attendant.attend(second)
        assert attendant._streams == [second]


def test_attendant_is_woken_when_a_method_begins(attendant):
    """The loop may have taken the wake-up of a message before the attendant has seen it."""
    thread = threading.Thread(target=attendant._sleep)
    thread.start()
    wait_until(lambda: attendant._turn.is_asleep, TIMEOUT)
    attendant._turn.wake()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    assert not attendant._turn.is_asleep


@in_loop
async def test_attendant_does_not_sleep_after_a_message(net, attendant):
    with net.stream(zmq.REP) as (subject, _address):
        attendant.attend(subject)
        attendant._wait([], 0)
        subject.received += 1
        attendant._sleep()
        assert not attendant._turn.is_asleep


@in_loop
async def test_attendant_without_a_context(net, attendant):
    """Other code has terminated it, while a method ran."""
    with net.stream(zmq.REP) as (subject, _address):
        attendant.attend(subject)
        attendant.step()
        subject.turn.is_free = True
        subject.socket.close(0)
        assert not attendant.step()
        subject.turn.is_free = False
        attendant._turn.wake()
        attendant._sleep()
        assert subject.socket is not None  # only the thread of its loop closes a stream
        subject.close()
        assert not attendant.step()
