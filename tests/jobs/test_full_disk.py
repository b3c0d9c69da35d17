# SPDX-License-Identifier: ZPL-2.1
"""A disk that is full, or damages a file: nothing accepted is lost, and it recovers by itself."""

import os
import resource
import signal
from multiprocessing.context import ForkProcess

import pytest

from checks import TIMEOUT, wait_until
from disks import Ballast, run_on_small_disk
from journals import Bench, make_job, writing
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import writer as writer_module

REPLY = b'[200, null]'
MIB = 1 << 20


def accept_until_full(writer, loop, size=20_000):
    """Submit jobs until one is refused; return the ids of those that were accepted."""
    accepted = []
    while True:
        job_id = f'job {len(accepted)}'
        outcome = loop.wait(writer.accept, make_job(job_id, frames=[bytes(size)]))
        if isinstance(outcome, ZMQMessageError):
            assert outcome.status == 507
            assert 'cannot be written' in outcome.text
            return accepted
        accepted.append(job_id)


class Limit:
    """A limit for the size of the files of this process."""

    def __init__(self, size):
        self.size = size

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))

    def remove(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def check_full_disk(path, ballast):
    """Run jobs on a disk that is full for a time."""
    writer_module._RETRY_PAUSE = 0.01
    with writing(path) as (journal, writer, loop):
        for job_id in ('running', 'again', 'first'):
            assert loop.wait(writer.accept, make_job(job_id)).is_new
        running, again = loop.wait(writer.claim, 2, ['convert']).jobs
        ballast.fill()
        accepted = accept_until_full(writer, loop)
        assert writer.problem
        outcomes, states = [], []
        writer.end(running.number, 1, 'done', REPLY, outcomes.append)
        writer.change(again.number, 1, states.append, failures=1)
        for number in range(20):  # each one is refused
            job = make_job(f'refused {number}', frames=[bytes(MIB)])
            assert loop.wait(writer.accept, job).status == 507
        assert journal.reader.get('first').state == 'waiting'  # reading goes on
        ballast.remove()
        while not (outcomes and states):
            loop.turn()
        assert (outcomes, states) == ([True], ['waiting'])
        assert loop.wait(writer.accept, make_job('last')).is_new
        wait_until(lambda: not writer.problem)
    bench = Bench(path)
    expected = {'running': 'done'} | dict.fromkeys(['again', 'first', *accepted, 'last'], 'waiting')
    assert bench.states() == expected
    bench.close()


def check_full_disk_of_jobs(path):
    """The disk is full of jobs; those that end make room for others."""
    writer_module._RETRY_PAUSE = writer_module._TIDY_INTERVAL = 0.01
    writer_module._TIDY_PAUSE = 0
    with writing(path) as (journal, writer, loop):
        journal.keep = 0.01
        accepted = accept_until_full(writer, loop)
        assert len(accepted) > 10
        seen = []
        while len(seen) < len(accepted):
            for job in loop.wait(writer.claim, 3, ['convert']).jobs:
                seen.append(job.id)
                assert loop.wait(writer.end, job.number, job.attempt, 'done', REPLY) is True
        assert sorted(seen) == sorted(accepted)
        outcome = None
        while not getattr(outcome, 'is_new', False):  # until the upkeep has removed some
            outcome = loop.wait(writer.accept, make_job('next', frames=[bytes(20_000)]))


def test_limit_of_the_size(path, monkeypatch, caplog):
    """Only new jobs are refused, until old ones are removed."""
    monkeypatch.setattr(writer_module, '_TIDY_INTERVAL', 0.01)
    with writing(path, size=300_000) as (journal, writer, loop):
        accepted = accept_until_full(writer, loop)
        assert 8 < len(accepted) < 15
        assert path.with_name(f'{path.name}-wal').stat().st_size > 0  # nothing made room in vain
        refused = loop.wait(writer.accept, make_job('refused'))
        assert 'bytes, and the limit is 300000: raise journal_size, or lower keep' in refused.text
        assert 'the limit is 300000' in writer.problem
        assert loop.wait(writer.cancel, accepted[0]).state == 'cancelled'
        assert loop.wait(writer.retry, accepted[0]) == 'waiting'
        for job in loop.wait(writer.claim, len(accepted), ['convert']).jobs:
            assert loop.wait(writer.end, job.number, job.attempt, 'done', bytes(5000)) is True
        assert journal.counts.states['done'] == len(accepted)
        assert loop.wait(writer.accept, make_job('refused')).status == 507
        journal._size = int(journal._upkeep.used / 0.97)
        assert loop.wait(writer.accept, make_job('one')).is_new
        assert writer.problem  # else the log would have each job that is removed
        journal._size = 300_000
        journal.keep = 0.01
        wait_until(lambda: not writer.problem)
        assert loop.wait(writer.accept, make_job('new')).is_new
    assert [record.levelname for record in caplog.records] == ['ERROR', 'WARNING']


def check_kill_on_full_disk(path, ballast):
    """A broker is killed while the disk is full; the next one starts and serves."""
    read, write = os.pipe()

    def serve():
        with writing(path) as (_journal, writer, loop):
            loop.wait(writer.accept, make_job('running'))
            loop.wait(writer.claim, 1, ['convert'])
            ballast.fill()
            accepted = accept_until_full(writer, loop, 3000)
            os.write(write, ' '.join(accepted).encode() + b'.')
            signal.pause()

    child = ForkProcess(target=serve)
    child.start()
    text = b''
    while not text.endswith(b'.'):
        text += os.read(read, 65536)
    child.kill()
    child.join()
    with writing(path) as (journal, writer, loop):
        assert [job.id for job in journal.reader.running()] == ['running']
        job = make_job('large', frames=[bytes(MIB)])
        assert loop.wait(writer.accept, job).status == 507
        ballast.remove()
        assert loop.wait(writer.accept, make_job('next')).is_new
        assert journal.counts.states['waiting'] == text.count(b'job') + 1


def run_with_limit(function, path, size):
    """Call a function in a process whose files cannot become larger than some bytes."""
    child = ForkProcess(target=function, args=(path, Limit(size)))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


@pytest.mark.parametrize('check', [check_full_disk, check_kill_on_full_disk])
def test_full_disk(tmp_path, check):
    run_on_small_disk(lambda disk: check(disk / 'jobs', Ballast(disk)), tmp_path)


def test_disk_full_of_jobs(tmp_path):
    run_on_small_disk(lambda disk: check_full_disk_of_jobs(disk / 'jobs'), tmp_path)


def test_limit_of_the_size_of_files(path):
    run_with_limit(check_full_disk, path, 300_000)


def test_file_that_is_damaged_while_it_is_used(path):
    bench = Bench(path)
    for number in range(100):
        bench.accept(str(number), frames=[bytes(2000)])
    bench.close()
    with writing(path) as (journal, writer, loop):
        for db in (journal._db, journal.reader._db):
            db.execute('pragma cache_size = 1')
        with path.open('r+b') as file:
            file.write(b'\x55' * path.stat().st_size)
        refused = loop.wait(writer.accept, make_job('new'))
        assert refused.status == 507
        with pytest.raises(ZMQMessageError, match='500 The journal cannot be read'):
            journal.reader.page()
