# SPDX-License-Identifier: ZPL-2.1
"""A stream that replies: requests, replies and their frames."""

import pytest
import zmq

from checks import until
from pyams_zmq.auth import Access
from pyams_zmq.process.connections import Listener
from streams import BURST, in_loop, receive


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
async def test_second_reply_is_an_error(net):
    with net.stream(zmq.REP) as (subject, _address):
        with pytest.raises(zmq.ZMQError, match='no message to reply to'):
            subject.send(b'nobody asked')
        assert not subject.sending()


@in_loop
async def test_reply_of_a_wrong_type(net, caplog):
    with net.stream(zmq.REP, lambda frames: subject.send('text')) as (subject, address):
        client = net.connect(zmq.DEALER, address)
        for _ in range(10):
            client.send_multipart([b'', b'x'])
        assert await receive(client, 10) == [[b'', b'[500,"Internal error"]']] * 10
    assert 'TypeError' in caplog.text


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
