# SPDX-License-Identifier: ZPL-2.1
"""A stream that reads messages ahead: its limits, and its recovery."""

import zmq

from checks import TIMEOUT, until
from pyams_zmq.handler.turn import Turn
from pyams_zmq.process import waiting as waiting_module
from pyams_zmq.process.attendant import Attendant
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
        subject.read_ahead(monotonic() - 1)
        assert subject.waiting.count == 0
        subject.read_ahead(monotonic() + TIMEOUT)
        assert subject.waiting.count == 1
        subject.close()
        subject.read_ahead(monotonic() + TIMEOUT)


@in_loop
async def test_recovery_of_the_turn(net):
    """A signal handler may raise between the end of a method and the next step."""
    with net.stream(zmq.REP) as (subject, _address):
        subject.turn = Turn()
        subject.turn.is_free = True
        subject.recover()
        assert not subject.turn.take()


@in_loop
async def test_attendant(net):
    with net.stream(zmq.REP) as (subject, address):
        attendant = Attendant(lambda: None)
        attendant.attend(subject)
        client = net.connect(zmq.DEALER, address)
        client.send_multipart([b'', b'x'])
        assert attendant.step()  # it has not seen this stream before
        assert not attendant.step()  # the loop has the turn
        assert subject.waiting.count == 0
        subject.turn.is_free = True

        def read():
            attendant.step()
            return subject.waiting.count

        await until(read)
        attendant.start()
        attendant.stop()


@in_loop
async def test_attendant_without_a_context(net):
    """Other code has terminated it, while a method ran."""
    with net.stream(zmq.REP) as (subject, _address):
        attendant = Attendant(lambda: None)
        attendant.attend(subject)
        attendant.step()
        subject.turn.is_free = True
        subject.socket.close(0)
        assert not attendant.step()
        subject.turn.is_free = False
        subject.close()
        assert not attendant.step()
        attendant.start()
        attendant.stop()
