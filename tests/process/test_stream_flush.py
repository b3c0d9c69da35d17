# SPDX-License-Identifier: ZPL-2.1
"""Messages that wait in a ZMQStream: flushed, refused or left there."""

import asyncio

import zmq

from checks import until
from pyams_zmq.process.reply_stream import ReplyStream
from streams import in_loop, receive


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
async def test_refusal_of_what_was_read_ahead(net):
    """The message whose callback has not replied yet gets a reply, too."""
    received = []
    with net.stream(zmq.REP, received.append) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        for message in (b'one', b'two', b'three'):
            client.send_multipart([b'', message])
        await until(lambda: subject.waiting.count == 2)
        subject.refuse_waiting(b'refused')
        subject.close()
        subject.refuse_waiting(b'refused')
        replies = await receive(client, 3)
    assert replies == [[b'', ReplyStream.failure_reply], [b'', b'refused'], [b'', b'refused']]
    assert received == [[b'one']]


@in_loop
async def test_stream_without_a_callback_is_left_alone(net):
    with net.stream(zmq.PULL) as (subject, address):
        subject.on_recv(None)
        client = net.connect(zmq.PUSH, address)
        client.send(b'x')
        await until(subject.readable)
        await asyncio.sleep(0)  # for a recv of the stream, which must not happen
        assert subject.socket.recv(zmq.NOBLOCK) == b'x'
