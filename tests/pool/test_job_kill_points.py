# SPDX-License-Identifier: ZPL-2.1
"""A broker that is killed at each step of a job: nothing is lost, and nothing is begun again."""

import os
import signal
from functools import partial

import pytest

from checks import TIMEOUT, wait_until
from job_checks import Asker, lines_of
from pyams_zmq.jobs.writer import JournalWriter
from pyams_zmq.pool import job_service, protocol

JOURNAL_STEPS = ['before begin', 'begun', 'before commit', 'committed', 'reported']
BROKER_STEPS = [
    f'{when} {what}' for what in ('answer', 'send', 'acknowledge') for when in ('before', 'after')
]
KILLS = 6
"""Brokers that are killed: the n-th one when it reaches the step for the n-th time"""


class Killer:
    """Kills the broker at a step; the others go on.

    :param folder: has a file `armed` while brokers are killed, and a line for each kill in `kills`
    """

    def __init__(self, folder, step):
        self.armed, self.kills = folder / 'armed', folder / 'kills'
        self.step = step
        self.pid = self.left = 0

    def count(self):
        return len(self.kills.read_bytes()) if self.kills.exists() else 0

    def reach(self, step):
        if step != self.step or not self.armed.exists():
            return
        if self.pid != os.getpid():
            self.pid, self.left = os.getpid(), self.count() + 1
        self.left -= 1
        if not self.left:
            with self.kills.open('ab') as file:
                file.write(b'x')
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, what, function, *args, **kwargs):
        self.reach(f'before {what}')
        result = function(*args, **kwargs)
        self.reach(f'after {what}')
        return result

    def install(self, monkeypatch):
        """Let the brokers that are forked from now on reach all steps."""
        reach, around = self.reach, self.around

        class Writer(JournalWriter):
            def _reach(self, step):
                reach(step)

        class Service(job_service.JobService):
            def _reply(self, *args):
                around('answer', super()._reply, *args)

        send, command = job_service.send_job, job_service.send_command

        def send_command(name, *args, **options):
            if name == protocol.ACK:
                around('acknowledge', command, name, *args, **options)
            else:
                command(name, *args, **options)

        monkeypatch.setattr(job_service, 'JournalWriter', Writer)
        monkeypatch.setattr(job_service, 'JobService', Service)
        monkeypatch.setattr(job_service, 'send_job', partial(around, 'send', send))
        monkeypatch.setattr(job_service, 'send_command', send_command)


@pytest.mark.parametrize('step', JOURNAL_STEPS + BROKER_STEPS)
def test_kill_at_each_step(job_pool, tmp_path, monkeypatch, step):
    """Each job is accepted, begins, fails, begins again and ends, one after the other."""
    killer = Killer(tmp_path, step)
    killer.install(monkeypatch)
    log = tmp_path / 'log'
    args = {'log': str(log), 'until': 2}
    pool = job_pool()
    begun = {}
    with Asker(pool) as asker:
        killer.armed.touch()
        while killer.count() < KILLS:
            job_id = f'job-{len(begun)}'
            assert asker.submit('fail', args, id=job_id) == job_id
            assert asker.job(job_id)['state'] in ('waiting', 'running', 'done')
            assert asker.wait(job_id)['state'] == 'done'
            begun[job_id] = [int(line[1]) for line in lines_of(log) if line[0] == job_id]
        killer.armed.unlink()
        wait_until(lambda: asker.ask('ping')[0] == 200, TIMEOUT)
        asker.run('fail', args, id='last')
        jobs = {job_id: asker.job(job_id) for job_id in begun}
    for job_id, job in jobs.items():
        assert (job['state'], job['reply']) == ('done', [200, job['attempt']])
        attempts = [int(line[1]) for line in lines_of(log) if line[0] == job_id]
        assert attempts == begun[job_id], 'it has begun after its end'
        assert attempts[-1] == job['attempt']
        # What a worker has in hand goes on, and its reply is not lost.
        assert len(attempts) <= 2
