# SPDX-License-Identifier: ZPL-2.1
"""Importable handlers with jobs, and pools with a journal."""

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import zmq_method
from pyams_zmq.jobs import zmq_job
from pyams_zmq.message import Multipart
from pyams_zmq.pool import ZMQPool


def note(path, *words):
    """Add a line to a file: other processes may do so at the same time."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (' '.join(map(str, words)) + '\n').encode())
    os.close(fd)


class Jobs:
    """Has jobs that end in many ways; most write a line to the file `args['log']` first."""

    def ping(self, args):
        return [200, os.getpid()]

    @zmq_method(timeout=20)
    def hold(self, path):
        while Path(path).exists():
            time.sleep(0.001)  # no event announces the removal
        return [200, os.getpid()]

    @zmq_job()
    def add(self, args):
        return [200, sum(args)]

    @zmq_job()
    def show(self, args, *, job, peer):
        return [200, [job.id, job.type, job.attempt, peer.address, args]]

    @zmq_job()
    def text(self, args):
        return args

    @zmq_job()
    def repeat(self, args):
        return 'x' * args

    @zmq_job()
    def with_frames(self, args):
        return Multipart([200, None], [b'frame'])

    @zmq_job()
    def frames(self, first, args):
        return [200, [first.decode(), args]]

    @zmq_job(retries=2, backoff=0.01)
    def fail(self, args, *, job):
        """Fail until an attempt."""
        note(args['log'], job.id, job.attempt, 'begin')
        if job.attempt < args['until']:
            raise ValueError('not yet')
        return [200, job.attempt]

    @zmq_job(retries=5, backoff=0.01)
    def refuse(self, args, *, job):
        raise ZMQMessageError(args, f'attempt {job.attempt}')

    @zmq_job()
    def work(self, args, *, job):
        """Publish progress until the file `args['path']` is gone."""
        note(args['log'], job.id, job.attempt, os.getpid())
        done = 0
        while Path(args['path']).exists():
            done += 1
            job.progress(done, args.get('total'), 'working')
            time.sleep(0.005)  # no event announces the removal
        return [200, [job.attempt, os.getpid()]]

    @zmq_job()
    async def work_async(self, args, *, job):
        note(args['log'], job.id, job.attempt, os.getpid())
        job.progress(1, 2)
        while os.path.exists(args['path']):  # noqa: ASYNC240 - a short call
            await asyncio.sleep(0.005)  # no event announces the removal
        return [200, [job.attempt, os.getpid()]]

    @zmq_job()
    def stubborn(self, args, *, job):
        """Run a program and ignore cancels until the file `args['path']` is gone.

        The program writes a line to the log for each SIGTERM.
        """
        code = 'trap "echo terminated >> \'$0\'" TERM; while :; do sleep 0.05; done'
        with subprocess.Popen(['sh', '-c', code, args['log']]) as program:
            note(args['log'], job.id, job.attempt, os.getpid(), program.pid)
            while Path(args['path']).exists():
                time.sleep(0.005)  # no event announces the removal
            program.kill()
        return [200, None]

    @zmq_job()
    def report(self, args, *, job):
        """Publish progress when the file `args['path']` is gone."""
        note(args['log'], job.id, job.attempt, os.getpid())
        while Path(args['path']).exists():
            time.sleep(0.005)  # no event announces the removal
        job.progress(1)
        return [200, job.attempt]

    @zmq_job()
    def die(self, args, *, job):
        note(args['log'], job.id, job.attempt, os.getpid())
        if job.attempt < args['until']:
            os.kill(os.getpid(), signal.SIGKILL)
        return [200, job.attempt]

    @zmq_job(timeout=0.2, retries=1, backoff=0.01)
    def slow(self, args, *, job):
        note(args['log'], job.id, job.attempt, 'begin')
        while job.attempt == 1:
            job.progress(0)
            time.sleep(0.005)  # the work
        return [200, job.attempt]

    @zmq_job()
    def nap(self, args, *, job):
        """Sleep; the log says when it begins and ends."""
        note(args['log'], job.id, job.attempt, 'begin')
        time.sleep(args['seconds'])
        note(args['log'], job.id, job.attempt, 'end')
        return [200, job.attempt]


class Calls:
    """Has no jobs."""

    def ping(self, args):
        return [200, os.getpid()]


class JobPool(ZMQPool):
    """Pool with short times."""

    beat_interval = 0.1
    drain_timeout = 5.0
    max_message_size = 1024 * 1024
