# SPDX-License-Identifier: ZPL-2.1
"""A service that converts video clips in the background, built on pyams_zmq.

The ØMQ process answers every message at once. It runs each conversion in a child process, and a
thread that reads the reports of the child.
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
"""Limit of concurrent conversions; the service refuses more"""

MAX_FINISHED = 100
"""Number of finished conversions whose status is kept"""


class FFmpegProcess(Process):
    """Child process that converts one clip and sends its progress through a pipe."""

    def __init__(self, source, target, format_name):
        super().__init__()
        self.source, self.target, self.format_name = source, target, format_name
        self.conversion = Conversion()
        self.reader, self.writer = Pipe(duplex=False)

    def start(self):
        """Start the child, and leave the writing end of the pipe to it: the pipe ends with it."""
        super().start()
        self.writer.close()

    def run(self):
        """Convert the clip and report the result."""
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
        """Write the target completely, or not at all."""
        folder = self.target.parent  # a rename works only within one file system
        if self.target.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        with TemporaryDirectory(prefix='.conversion-', dir=folder) as scratch:
            part = Path(scratch, 'part')
            for seconds, duration in self.conversion.run(self.source, part, self.format_name):
                self.report(seconds=seconds, duration=duration)
            part.replace(self.target)

    def report(self, **changes):
        """Send changes of the status to the service."""
        try:
            self.writer.send(changes)
        except OSError:  # the service was killed
            self.conversion.stop()


class ConversionThread(Thread):
    """Thread of the service that reads the reports of a conversion."""

    def __init__(self, process, status):
        super().__init__()
        self.process, self.status = process, status

    def run(self):
        """Update the status until the process of the conversion has ended."""
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
    """Handles the messages."""

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
        # The suffix is appended, so the target is never the clip itself.
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
        """Return the status of a conversion."""
        if not isinstance(key, str) or key not in self.conversions:
            raise ZMQMessageError(404, f'Unknown conversion {key!r}')
        return [200, self.conversions[key]]

    def formats(self, _data):
        """Return the names of the target formats."""
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
            str(source).encode()  # a reply must be able to contain it
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, 'strerror', error)
            raise ZMQMessageError(404, f'Cannot open {path!r}: {reason}') from None
        if not source.is_file():
            raise ZMQMessageError(400, f'{path!r} is not a file')
        return source, name


class ConversionMessageHandler(ZMQMessageHandler):
    """Passes the messages to a ConversionHandler."""

    handler = ConversionHandler


class ConversionProcess(ZMQProcess):
    """The service."""

    drain_timeout = 1.0  # seconds; stop() does not wait for the end of a conversion

    def setup(self):
        """Fail at the start if ffmpeg is not installed."""
        get_ffmpeg_exe()
        super().setup()
