# SPDX-License-Identifier: ZPL-2.1
"""A service that converts video clips in the background: a few lines on top of pyams_zmq.

A ØMQ process answers every message at once. Each conversion is a child of it, which a thread
follows.
"""

import errno
import os
import signal
from multiprocessing import Pipe, Process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from uuid import uuid4

from clips import FORMATS, ClipError, Conversion
from imageio_ffmpeg import get_ffmpeg_exe

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.process import ZMQProcess

MAX_RUNNING = 2
"""Conversions at the same time; more are refused"""

MAX_FINISHED = 100
"""Finished conversions that `status` still knows"""


class FFmpegProcess(Process):
    """Child that converts one clip, and reports into a pipe as it goes."""

    def __init__(self, source, target, format_name):
        super().__init__()
        self.source, self.target, self.format_name = source, target, format_name
        self.conversion = Conversion()
        self.reader, self.writer = Pipe(duplex=False)

    def start(self):
        """Fork; from now on the pipe ends with the child."""
        super().start()
        self.writer.close()

    def run(self):
        """Convert, and report how that ended."""
        self.reader.close()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: self.conversion.stop())
        try:
            self.convert()
        except ClipError as error:
            self.report(state='failed', error=str(error))
        except OSError as error:
            self.report(state='failed', error=f'Cannot write {self.target}: {error.strerror}')
        else:
            self.report(state='done')

    def convert(self):
        """Write the target, all of it or nothing."""
        folder = self.target.parent  # a file can be renamed only within its file system
        if self.target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        with TemporaryDirectory(prefix='.conversion-', dir=folder) as scratch:
            part = Path(scratch, 'part')
            for seconds, duration in self.conversion.run(self.source, part, self.format_name):
                self.report(seconds=seconds, duration=duration)
            part.replace(self.target)

    def report(self, **changes):
        """Tell the service."""
        try:
            self.writer.send(changes)
        except OSError:  # it was killed
            self.conversion.stop()


class ConversionThread(Thread):
    """Thread of the service that follows a conversion."""

    def __init__(self, process, status):
        super().__init__()
        self.process, self.status = process, status

    def run(self):
        """Keep the status up to date; it is done when its process has ended."""
        end = {'state': 'failed', 'error': 'The conversion was killed'}
        with self.process.reader as reports:
            try:
                while True:
                    report = reports.recv()
                    if 'state' in report:
                        end = report
                    else:
                        self.status.update(report)
            except EOFError:
                self.process.join()
        self.status.update(end)


class ConversionHandler:
    """Answers the messages."""

    def __init__(self):
        self.conversions = {}

    def convert(self, data):
        """Start a conversion: `{'path': '/clips/film.mov', 'format': 'webm'}`."""
        source, format_name = self._check(data)
        finished = [key for key, each in self.conversions.items() if each['state'] != 'running']
        if len(self.conversions) - len(finished) >= MAX_RUNNING:
            raise ZMQMessageError(503, f'{MAX_RUNNING} conversions are running, try again later')
        for key in finished[:-MAX_FINISHED]:
            del self.conversions[key]
        # Beside the clip, and never the clip itself.
        target = Path(f'{source}.{format_name}')
        process = FFmpegProcess(source, target, format_name)
        process.start()
        status = {'state': 'running', 'seconds': 0, 'duration': None, 'error': None}
        status['target'] = str(target)
        ConversionThread(process, status).start()
        key = uuid4().hex
        self.conversions[key] = status
        return [200, key]

    def status(self, key):
        """Tell how far a conversion is."""
        if not isinstance(key, str) or key not in self.conversions:
            raise ZMQMessageError(404, f'Unknown conversion {key!r}')
        return [200, self.conversions[key]]

    def formats(self, _data):
        """Tell what a clip can be converted to."""
        return [200, list(FORMATS)]

    @staticmethod
    def _check(data):
        match data:
            case {'path': str(path), 'format': str(name), **rest} if not rest:
                pass
            case _:
                raise ZMQMessageError(400, "'convert' takes {'path': PATH, 'format': FORMAT}")
        if name not in FORMATS:
            raise ZMQMessageError(400, f'Unknown format {name!r}, known: {", ".join(FORMATS)}')
        if not Path(path).is_absolute():
            raise ZMQMessageError(400, f'The path {path!r} is not absolute')
        try:
            source = Path(path).resolve(strict=True)
            str(source).encode()  # or it cannot be told in an answer
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, 'strerror', error)
            raise ZMQMessageError(404, f'Cannot open {path!r}: {reason}') from None
        if not source.is_file():
            raise ZMQMessageError(400, f'{path!r} is not a file')
        return source, name


class ConversionMessageHandler(ZMQMessageHandler):
    """Hands the messages to a ConversionHandler."""

    handler = ConversionHandler


class ConversionProcess(ZMQProcess):
    """The service."""

    drain_timeout = 1.0  # seconds: whoever stops it does not wait for the end of a film

    def setup(self):
        """Start only where there is an ffmpeg."""
        get_ffmpeg_exe()
        super().setup()
