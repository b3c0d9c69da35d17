# SPDX-License-Identifier: ZPL-2.1
"""What a ZMQStream sends: at once, or when there is a peer."""

import asyncio

import pytest
import zmq
from zmq.eventloop.zmqstream import ZMQStream as BaseZMQStream

from checks import until
from pyams_zmq.process.stream import ZMQStream
from streams import BURST, in_loop, receive


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
async def test_bad_message_behind_one_that_waits(net, caplog):
    with net.stream(zmq.PUSH) as (subject, address):
        for message in (b'one', 'two', b'three'):
            subject.send(message)
        client = net.connect(zmq.PULL, address)
        assert await receive(client, 2) == [[b'one'], [b'three']]
    assert len(caplog.records) == 1
    assert 'A message cannot be sent' in caplog.text


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
async def test_stop_on_send(net):
    calls = []
    with net.stream(zmq.PUSH) as (subject, address):
        subject.send(b'x', callback=lambda *args: calls.append(args))
        subject.stop_on_send()
        assert await receive(net.connect(zmq.PULL, address), 1) == [[b'x']]
    assert not calls


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
