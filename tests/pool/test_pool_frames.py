# SPDX-License-Identifier: ZPL-2.1
"""Binary frames through the broker of a pool and its workers."""

from functools import partial

import pytest

from checks import TIMEOUT
from frame_handlers import FrameMessageHandler
from pool_checks import client_of, in_threads, wait_for_file, wait_for_queue, wait_for_workers
from pool_handlers import Pool
from pyams_zmq.exceptions import ZMQRemoteError
from pyams_zmq.message import MAX_FRAMES, Multipart
from raw_peer import RawPeer

MIB = 1024 * 1024


@pytest.fixture
def frame_pool(start):
    """Start a pool whose methods take and return frames."""

    def start_pool(**attributes):
        factory = type('FramePool', (Pool,), attributes)
        return start(handler=FrameMessageHandler, factory=factory)

    return start_pool


@pytest.mark.parametrize('concurrency', [1, 3])
def test_each_way_to_reply(frame_pool, concurrency):
    process = frame_pool(concurrency=concurrency)
    names = ['crop', 'async_crop', 'thread_crop', 'future_crop', 'peer_crop', 'request_crop']
    with client_of(process) as client:
        for name in names:
            for size in (7, 100_000):  # larger ones are not copied in the broker
                reply = client.call(name, size - 1, frames=[b'x' * size])
                assert reply == Multipart(size, [b'x' * (size - 1)])
        assert client.call('mirror', 1, frames=[b'a', b'', b'b' * 70_000]) == Multipart(
            1, [b'a', b'', b'b' * 70_000]
        )
    # The type is in the last frame.
    methods = process.stats()['methods']
    assert {name: methods[name]['calls'] for name in names} == dict.fromkeys(names, 2)
    assert '(others)' not in methods


def test_repeated_call_has_its_frames(frame_pool, tmp_path):
    """A worker that dies does not lose them."""
    process = frame_pool()
    picture = bytes(range(256)) * 4096
    with client_of(process) as client:
        workers = wait_for_workers(process)
        pid, frames = client.call(
            'die_once_repeatable', str(tmp_path / 'first'), frames=[b'small', picture][1:]
        )
        assert frames == [picture[::-1]]
        assert pid in wait_for_workers(process) | workers
        with pytest.raises(ZMQRemoteError, match='502 The worker died'):
            client.call('die_once', str(tmp_path / 'second'), frames=[b'small'])
    assert process.stats()['repeated'] == 1


def test_sizes(frame_pool):
    process = frame_pool(max_message_size=10 * MIB, max_reply_size=2 * MIB)
    with client_of(process) as client:
        half = bytes(5 * MIB)
        with pytest.raises(ZMQRemoteError, match='413 Message is 10485774 bytes'):
            client.call('sizes', None, frames=[half, half])
        assert client.call('sizes', 1, frames=[half, half[20:]]) == [5 * MIB, 5 * MIB - 20, 1]
        with pytest.raises(ZMQRemoteError, match='The reply is 2097162 bytes; the limit is 209715'):
            client.call('large', [MIB, MIB])
        assert [len(frame) for frame in client.call('large', [MIB, MIB - 10]).frames] == [
            MIB,
            MIB - 10,
        ]


def test_number_of_frames(frame_pool):
    process = frame_pool()
    with client_of(process) as client:
        frames = [b'%d' % number for number in range(MAX_FRAMES)]
        assert client.call('mirror', 1, frames=frames) == Multipart(1, frames)
        with pytest.raises(ZMQRemoteError, match='500 Internal error'):
            client.call('many', MAX_FRAMES + 1)
    with RawPeer(process.bound_address) as peer:
        peer.send(b'\1\0' * 1002 + b'\0\1x')
        assert peer.read_reply() == [400, 'Bad message of 1002 frames; the limit is 1001']


def test_queue_counts_frames(frame_pool, tmp_path):
    """Calls whose frames together exceed the limit of a connection get 503."""
    process = frame_pool(client_queue_size=3 * MIB)
    paths = [tmp_path / 'one', tmp_path / 'two']
    with (
        client_of(process) as client,
        client_of(process) as waiting,
        in_threads(lambda path: client.call('wait_for', str(path)), *paths),
    ):
        try:
            for path in paths:
                wait_for_file(path)
            frames = [bytes(MIB), bytes(MIB)]
            waiting.send('sizes', 1, frames=frames)
            wait_for_queue(process, 1)
            assert 2 * MIB < process.stats()['queue_bytes'] < 2.1 * MIB
            refuse = partial(waiting.request, ['sizes', 1], timeout=TIMEOUT)
            assert process.stats()['queue'] == 1
        finally:
            for path in paths:
                path.unlink()
        assert refuse(frames=frames) == [200, [MIB, MIB, 1]]
