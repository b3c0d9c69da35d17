# SPDX-License-Identifier: ZPL-2.1
"""Replies with binary frames: the streams that send them, and the transactions of their methods."""

import asyncio
import time

import pytest
from pyramid.config import Configurator

from checks import TIMEOUT, wait_until
from frame_handlers import FrameHandler, FrameMessageHandler
from handlers import Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQRemoteError
from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.message import Multipart

CROPS = ['crop', 'async_crop', 'thread_crop', 'future_crop', 'peer_crop', 'request_crop']


@pytest.mark.parametrize('name', CROPS)
@pytest.mark.parametrize('concurrency', [1, 4])
def test_each_way_to_reply(start, concurrency, name):
    factory = type('Concurrent', (Process,), {'concurrency': concurrency})
    process = start(factory=factory, handler=FrameMessageHandler)
    with ZMQClient(process.bound_address) as client:
        assert client.call(name, 2, frames=[b'picture']) == Multipart(7, [b'pi'])


def test_with_access_control(start):
    """The frames come with their metadata then."""
    process = start(handler=FrameMessageHandler, auth='user:password')
    with ZMQClient(process.bound_address, auth='user:password') as client:
        assert client.call('crop', 2, frames=[b'picture']) == Multipart(7, [b'pi'])
        assert client.call('crop', 2, frames=[b'x' * 100_000]) == Multipart(100_000, [b'xx'])


class LateHandler(FrameHandler):
    """A method that ends after its deadline."""

    @zmq_method(timeout=0.05)
    def late(self, picture, args):
        time.sleep(0.2)  # measures time: longer than the time limit
        return Multipart([200, None], [picture])

    @zmq_method(timeout=0.05)
    async def async_late(self, picture, args):
        await asyncio.sleep(60)  # is cancelled at the time limit


class LateMessageHandler(ZMQMessageHandler):
    """Serves LateHandler."""

    handler = LateHandler


@pytest.mark.parametrize('name', ['late', 'async_late'])
def test_deadline(start, name):
    process = start(handler=LateMessageHandler)
    with ZMQClient(process.bound_address) as client:
        with pytest.raises(ZMQRemoteError, match='504'):
            client.call(name, frames=[b'x'])
        assert client.call('crop', 1, frames=[b'xy'], timeout=TIMEOUT) == Multipart(2, [b'x'])


@pytest.mark.parametrize(('status', 'end'), [(200, 'commit'), (422, 'abort')])
def test_transaction(start, tmp_path, status, end):
    config = Configurator()
    config.include('pyramid_tm')
    config.commit()
    path = tmp_path / 'journal'
    process = start(handler=FrameMessageHandler, registry=config.registry)
    with ZMQClient(process.bound_address) as client:
        how = {'path': str(path), 'status': status}
        reply = client.request(['tm_crop', how], frames=[b'x'])
        assert reply == Multipart([status, None], [b'x'])
    assert path.read_text().split() == [end]


class Recorder:
    """A stream that records what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, data):
        self.sent.append(data)

    def send_multipart(self, frames):
        self.sent.append(frames)


@pytest.mark.parametrize('name', ['crop', 'async_crop'])
def test_stream_of_another_class(name):
    stream = Recorder()

    async def run():
        handler = FrameMessageHandler(None, stream, print)
        handler([b'abc', f'["{name}",1]'.encode()])
        handler([b'["echo",1]'])
        while len(stream.sent) < 2:
            await asyncio.sleep(0)  # one iteration of the loop; the handler replies in it

    asyncio.run(run())
    assert len(stream.sent) == 2
    assert b'[200,1]' in stream.sent
    assert [b'a', b'[200,3]'] in stream.sent


def test_sent_replies_are_announced(start):
    """`on_send` gets all frames of a reply."""
    process = start(factory=AnnouncingProcess, handler=FrameMessageHandler)
    with ZMQClient(process.bound_address) as client:
        assert client.call('crop', 1, frames=[b'xy']) == Multipart(2, [b'x'])
        assert client.call('async_crop', 1, frames=[b'xyz']) == Multipart(3, [b'x'])
        assert client.call('echo', 1) == 1
        wait_until(lambda: len(client.call('all_notes')) >= 3)
        assert client.call('all_notes')[:3] == [2, 2, 1]


class AnnouncingProcess(Process):
    """Notes how many frames each reply has."""

    def init_stream(self):
        super().init_stream()
        notes = self.rep_stream._recv_callback.rep_handler.notes
        self.rep_stream.on_send(lambda frames, status: notes.append(len(frames)))
