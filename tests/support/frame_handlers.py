# SPDX-License-Identifier: ZPL-2.1
"""Importable handlers that take and return binary frames."""

import asyncio
import os
import signal
from pathlib import Path

import zmq

from handlers import Journal, MessageHandler, RecordingHandler
from pyams_zmq.handler import zmq_method
from pyams_zmq.message import Multipart


class FrameHandler(RecordingHandler):
    """Methods with binary frames, for each way in which a method replies."""

    def crop(self, picture, size):
        return Multipart([200, len(picture)], [picture[:size]])

    async def async_crop(self, picture, size):
        await asyncio.sleep(0)  # takes no time: the reply comes in another iteration of the loop
        return self.crop(picture, size)

    @zmq_method(timeout=60)
    def thread_crop(self, picture, size):
        return self.crop(picture, size)

    @zmq_method(timeout=60)
    def future_crop(self, picture, size):
        return self.async_crop(picture, size)

    def peer_crop(self, picture, size, *, peer):
        assert peer.address == '127.0.0.1'
        return self.crop(picture, size)

    def request_crop(self, picture, size, *, request):
        assert request.registry is self.process.registry
        return self.crop(picture, size)

    def sizes(self, *frames):
        return [200, [*map(len, frames[:-1]), frames[-1]]]

    def mirror(self, *frames):
        return Multipart([200, frames[-1]], frames[:-1])

    def reply(self, args):
        """Reply with each kind of buffer."""
        frames = [b'bytes', bytearray(b'bytearray'), memoryview(b'memory')[:3], zmq.Frame(b'frame')]
        return Multipart([200, args], frames)

    def bare(self, value):
        return Multipart(value, [b'x'])

    def many(self, count):
        return Multipart([200, count], (b'%d' % number for number in range(count)))

    def text(self, args):
        return Multipart([200, args], ['text'])

    def changed(self, args):
        reply = Multipart([200, args], [b'x'])
        reply.frames.append('text')
        return reply

    def nested(self, args):
        return [200, Multipart(args, [b'x'])]

    def not_json(self, args):
        return Multipart([200, object()], [b'x'])

    def large(self, sizes):
        return Multipart([200, None], map(bytes, sizes))

    def note_frames(self, *frames):
        self.notes.append([frame.decode() for frame in frames[:-1]] + [frames[-1]])
        return Multipart([200, None], frames[:-1])

    def refuse_frames(self, *frames):
        return Multipart([422, 'secret'], frames[:-1])

    def tm_crop(self, picture, how, *, request):
        request.tm.get().join(Journal(request.tm, how['path']))
        return Multipart([how['status'], None], [picture])

    def die_once(self, picture, path):
        """Kill this process, unless the file exists; then reply."""
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Multipart([200, os.getpid()], [picture[::-1]])

    @zmq_method(repeatable=True)
    def die_once_repeatable(self, picture, path):
        return self.die_once(picture, path)


class FrameMessageHandler(MessageHandler):
    """Serves FrameHandler."""

    handler = FrameHandler
