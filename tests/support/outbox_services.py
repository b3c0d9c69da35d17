# SPDX-License-Identifier: ZPL-2.1
"""Services that write down what they get, in their order: messages, and the beginnings of jobs."""

from pathlib import Path

from pyams_zmq.jobs import zmq_job


class Recorder:
    """Writes what it gets to a file.

    :param path: path of the file
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.touch()

    def note(self, name):
        with self.path.open('a') as file:  # one write, in one piece
            file.write(f'{name}\n')
        return [200, None]

    def names(self):
        """Return what it has got, in its order; in the process of the test."""
        return self.path.read_text().split()


class JobRecorder(Recorder):
    """The same, for jobs."""

    @zmq_job
    def note(self, name):
        return super().note(name)
