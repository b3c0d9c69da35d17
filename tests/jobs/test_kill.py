# SPDX-License-Identifier: ZPL-2.1
"""A broker that is killed: what was accepted is there, and what has ended does not begin."""

import os
import random
import signal
from collections import Counter
from multiprocessing.context import ForkProcess

import pytest

from checks import TIMEOUT
from journals import Bench, Loop, make_job
from pyams_zmq.jobs.journal import Journal
from pyams_zmq.jobs.writer import JournalWriter

STEPS = ['before begin', 'begun', 'before commit', 'committed', 'reported', 'handled']
REPLY = b'[200, null]'


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class KilledWriter(JournalWriter):
    """A writer that kills its process at the n-th occurrence of a step."""

    def __init__(self, journal, post, step, count):
        self.step, self.left = step, count
        super().__init__(journal, post)

    def _reach(self, step):
        if step == self.step:
            self.left -= 1
            if not self.left:
                kill()


class Broker:
    """A broker of one worker, which logs what it is told; the log survives a kill.

    :param log: descriptor of a file
    """

    def __init__(self, path, log, step=None, count=0):
        self.journal = Journal(str(path), lock_timeout=TIMEOUT)
        self.loop = Loop()
        self.step, self.left, self.log = step, count, log
        self.writer = KilledWriter(self.journal, self.loop.posted.put, step, count)

    def write(self, text):
        os.write(self.log, f'{text}\n'.encode())
        if self.step == 'handled':
            self.left -= 1
            if not self.left:
                kill()

    def submit(self, job_id):
        outcome = self.loop.wait(self.writer.accept, make_job(job_id))
        self.write(f'accepted {outcome.id}')

    def work(self):
        """Run jobs to their ends; each first attempt fails."""
        while jobs := self.loop.wait(self.writer.claim, 2, ['convert']).jobs:
            for job in jobs:
                self.write(f'begun {job.id}')
                if job.attempt == 1:
                    state = self.loop.wait(self.writer.change, job.number, 1, failures=1)
                    self.write(f'{state} {job.id}')
                else:
                    args = (job.number, job.attempt, 'done', REPLY)
                    if self.loop.wait(self.writer.end, *args):
                        self.write(f'ended {job.id}')

    def give_up(self):
        """Let the jobs of the former broker, whose worker is gone, begin again."""
        for job in self.journal.reader.running():
            assert job.orphaned is not None
            self.loop.wait(self.writer.change, job.number, job.attempt, deaths=job.deaths + 1)

    def close(self):
        assert self.writer.close()
        self.journal.close()


def read_log(path):
    return [tuple(line.split(' ', 1)) for line in path.read_text(encoding='utf-8').splitlines()]


def open_log(path):
    return os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)


def finish(path, log_path):
    """Let the next broker do what is left; check that nothing was lost or repeated wrongly."""
    before = read_log(log_path)
    log = open_log(log_path)
    broker = Broker(path, log)
    for event, job_id in before:
        job = broker.journal.reader.get(job_id)
        assert job is not None, f'{job_id} was {event}, and is lost'
        assert event != 'ended' or job.state == 'done'
    broker.give_up()
    broker.work()
    counts = {state: count for state, count in broker.journal.counts.states.items() if count}
    assert set(counts) <= {'done'}
    accepted = {job_id for event, job_id in before if event == 'accepted'}
    assert accepted <= {job.id for job in broker.journal.reader.page(state='done')}
    broker.close()
    os.close(log)
    ended = set()
    for event, job_id in read_log(log_path):
        assert event != 'begun' or job_id not in ended, f'{job_id} began after its end'
        if event == 'ended':
            ended.add(job_id)


@pytest.mark.parametrize('step', STEPS)
def test_kill_at_each_step(tmp_path, step):
    """Each of some jobs is accepted, begins, waits for another attempt, begins again and ends."""
    number, is_killed = 0, True
    while is_killed:
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        path, log_path = folder / 'jobs', folder / 'log'

        def serve(path=path, log_path=log_path, count=number):
            broker = Broker(path, open_log(log_path), step, count)
            for job_id in 'ab':
                broker.submit(job_id)
            broker.work()
            broker.close()

        log_path.touch()
        child = ForkProcess(target=serve)
        child.start()
        child.join(TIMEOUT)
        is_killed = child.exitcode == -signal.SIGKILL
        assert is_killed or child.exitcode == 0
        finish(path, log_path)
    assert number > 8


def test_kill_at_random_times(tmp_path):
    """Brokers that follow each other, each is killed; many jobs at a time."""
    path, log_path = tmp_path / 'jobs', tmp_path / 'log'
    log_path.touch()
    chance = random.Random(1)
    for turn in range(12):
        read, write = os.pipe()

        def serve(turn=turn, write=write):
            broker = Broker(path, open_log(log_path))
            broker.give_up()
            os.write(write, b'x')
            for number in range(1000):
                for part in range(10):
                    job = make_job(f'{turn}-{number}-{part}')
                    broker.writer.accept(job, lambda out: broker.write(f'accepted {out.id}'))
                [job, *_] = broker.loop.wait(broker.writer.claim, 1, ['convert']).jobs
                broker.write(f'begun {job.id}')
                if broker.loop.wait(broker.writer.end, job.number, job.attempt, 'done', REPLY):
                    broker.write(f'ended {job.id}')

        child = ForkProcess(target=serve)
        child.start()
        os.read(read, 1)
        child.join(chance.uniform(0, 0.2))
        child.kill()
        child.join(TIMEOUT)
        os.close(read)
        os.close(write)
    events = read_log(log_path)
    assert Counter(event for event, _ in events)['accepted'] > 50
    bench = Bench(path)
    ended = set()
    for event, job_id in events:
        job = bench.get(job_id)
        assert job is not None
        assert event != 'begun' or job_id not in ended
        if event == 'ended':
            ended.add(job_id)
            assert job.state == 'done'
    bench.close()
