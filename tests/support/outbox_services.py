# SPDX-License-Identifier: ZPL-2.1
"""Services that write down what they get, in their order: messages, and the beginnings of jobs."""

import os

from pyams_zmq.jobs import zmq_job


class Recorder:
    """Writes what it gets to a file.

    :ivar path: path of the file; a subclass has it
    """

    path = ''

    def __init__(self):
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(self, name):
        os.write(self._fd, f'{name}\n'.encode())
        return [200, None]


class JobRecorder(Recorder):
    """The same, for jobs."""

    @zmq_job
    def note(self, name):
        return super().note(name)
