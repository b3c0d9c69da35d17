# SPDX-License-Identifier: ZPL-2.1
"""How soon clients see what jobs do, and jobs what clients want; a long job under dying brokers.

The jobs that are cancelled by force run a real ffmpeg.
"""

import argparse
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil

from pyams_zmq.client import ZMQClient
from pyams_zmq.jobs import JobCancelled, zmq_job
from pyams_zmq.pool import ZMQPool
from pyams_zmq.testing import running

EXAMPLE = Path(__file__).resolve().parents[1] / 'examples' / 'media_converter'
sys.path.insert(0, str(EXAMPLE))
import clips  # noqa: E402 - the example is not a package
from converter import Converter  # noqa: E402 - nor is this

GOALS = {
    'progress is visible': 0.6,
    'cancel is known to the job': 0.6,
    'forced cancel is done': 1.5,
    'its ffmpeg is gone': 1.5,
}
"""Seconds, at most"""


class Jobs(Converter):
    """The jobs that are measured."""

    @zmq_job
    def publish(self, seconds, *, job):
        """Publish one progress; its text is the time."""
        time.sleep(seconds)
        job.progress(1, 2, repr(time.time()))
        time.sleep(1)
        return [200, None]

    @zmq_job
    def wait(self, path, *, job):
        """Write the time of the cancel to a file."""
        try:
            while True:
                job.progress(1)
                time.sleep(0.001)
        except JobCancelled:
            Path(path).write_text(repr(time.time()))
            raise

    @zmq_job
    def work(self, seconds, *, job):
        """Take some seconds."""
        for number in range(seconds * 10):
            job.progress(number, seconds * 10)
            time.sleep(0.1)
        return [200, None]


@contextmanager
def service(folder):
    """Run the service; yield it and a client."""
    pool = ZMQPool('127.0.0.1', Jobs)
    pool.journal = Path(folder, 'jobs')
    with running(pool), ZMQClient(pool.bound_address) as client:
        yield pool, client


def submit(client, *job):
    """Submit a job; return its id and its first progress."""
    job_id = client.submit(*job).id
    return job_id, next(info.progress for info in client.watch(job_id) if info.progress)


def measure_progress(client, number):
    """Return the delay of a progress, at various times between two heartbeats."""
    _job_id, progress = submit(client, 'publish', 0.2 + number * 0.037 % 0.5)
    return {'progress is visible': time.time() - float(progress.text)}


def measure_cancel(client, folder):
    """Return the time until a job notices a cancel."""
    path = Path(folder, 'cancelled')
    job_id, _progress = submit(client, 'wait', str(path))
    start = time.time()
    client.cancel(job_id)
    for _info in client.watch(job_id):
        pass
    return {'cancel is known to the job': float(path.read_text()) - start}


def measure_force(client, film):
    """Return the time until a forced cancel is seen, and until ffmpeg has ended."""
    job_id, _progress = submit(client, 'convert', {'path': str(film), 'format': 'webm'})
    [ffmpeg] = [
        process
        for process in psutil.process_iter(['cmdline'])
        if f'file:{film}' in (process.info['cmdline'] or [])
    ]
    start = time.monotonic()
    client.cancel(job_id, force=True)
    for _info in client.watch(job_id):
        pass
    done = time.monotonic() - start
    ffmpeg.wait()
    return {'forced cancel is done': done, 'its ffmpeg is gone': time.monotonic() - start}


def measure(rounds):
    """Print the delays, and the goals that are missed."""
    found = {name: [] for name in GOALS}
    with TemporaryDirectory() as folder, service(folder) as (_pool, client):
        film = Path(folder, 'film.mp4')
        clips.make_clip(film, 60)
        for number in range(rounds):
            for measured in (
                measure_progress(client, number),
                measure_cancel(client, folder),
                measure_force(client, film),
            ):
                for name, seconds in measured.items():
                    found[name].append(seconds)
    for name, values in found.items():
        missed = ' MISSED' if max(values) > GOALS[name] else ''
        print(
            f'{name:28} median {median(values):.3f} s, max {max(values):.3f}, '
            f'goal {GOALS[name]}{missed}'
        )


def outlive(seconds, kills):
    """Kill brokers under a long job; print what became of it, return 1 if it was begun again."""
    with TemporaryDirectory() as folder, service(folder) as (pool, client):
        job_id, _progress = submit(client, 'work', seconds)
        stop = threading.Event()

        def kill():
            for _number in range(kills):
                if not stop.wait(seconds / (kills + 1)):
                    os.kill(pool.stats(timeout=30)['pid'], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        start, last, silence = time.monotonic(), time.monotonic(), 0.0
        try:
            for job in client.watch(job_id):
                info, now = job, time.monotonic()
                silence, last = max(silence, now - last), now
        finally:
            stop.set()
            thread.join()
        print(
            f'a job of {seconds} s, {kills} brokers killed: {info.state} after '
            f'{time.monotonic() - start:.1f} s in attempt {info.attempt}; at most {silence:.2f} s '
            'without news'
        )
    return int((info.state, info.attempt) != ('done', 1))


def main():
    """Measure; the exit code is 1 if the long job was begun again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=20, help='jobs of each kind')
    parser.add_argument('--seconds', type=int, default=60, help='of the long job')
    parser.add_argument('--kills', type=int, default=4, help='of brokers under the long job')
    options = parser.parse_args()
    measure(options.rounds)
    sys.exit(outlive(options.seconds, options.kills))


if __name__ == '__main__':
    main()
