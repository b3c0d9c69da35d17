# SPDX-License-Identifier: ZPL-2.1
"""A journal that cannot be used or written, as those see it who run the service or call it."""

import logging
import os
import signal
import sqlite3
from contextlib import closing, contextmanager, suppress
from functools import partial
from types import SimpleNamespace

import pytest

from checks import TIMEOUT, wait_until
from disks import Ballast, run_on_small_disk
from job_checks import Asker, lines_of
from job_handlers import JobPool, Jobs
from namespaces import mount, run_unshared
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQJournalError, ZMQRemoteError, ZMQTimeoutError
from pyams_zmq.pool.job_service import JobService
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.testing import running
from raw_peer import RawPeer, request

ADDRESS = '127.0.0.1:0'
LARGE = [0] * 10_000


def make_pool(journal, address=ADDRESS):
    factory = type('OwnPool', (JobPool,), {'journal': journal})
    return factory(address, Jobs, workers=2)


@contextmanager
def asking(journal):
    """Run a pool with a journal; return it and a client."""
    with running(make_pool(journal)) as pool, Asker(pool) as asker:
        yield pool, asker


def refuse(journal, text):
    """Start a pool that cannot use its journal; check the error for the one who starts it."""
    with pytest.raises(ZMQJournalError, match=text) as raised, running(make_pool(journal)):
        pass
    assert str(raised.value).startswith(f'The journal {journal} cannot be used: ')


@pytest.fixture
def path(tmp_path):
    """Path of a journal with a job that waits."""
    path = tmp_path / 'x.jobs'
    with asking(path) as (_pool, asker):
        asker.submit('add', [1, 2], id='mine', delay=0.5)
    return path


@pytest.fixture
def service_log(tmp_path):
    """Return a function that reads the log of all processes."""
    handler = logging.FileHandler(tmp_path / 'service.log')
    logger = logging.getLogger('PyAMS (zmq)')
    logger.addHandler(handler)
    yield (tmp_path / 'service.log').read_text
    logger.removeHandler(handler)
    handler.close()


def check_job(path):
    with asking(path) as (_pool, asker):
        assert asker.wait('mine')['reply'] == [200, 3]


# Start


def test_damaged_file(path, service_log):
    good = path.read_bytes()
    bad = good[:4096] + bytes([0x55]) * (len(good) - 4096)
    path.write_bytes(bad)
    refuse(
        path,
        r'it is damaged, or .*: move it away with its -wal file, and restore a backup',
    )
    log = service_log()
    assert f'failed: The journal {path} cannot be used' in log
    assert 'Traceback' not in log
    assert path.read_bytes() == bad
    path.write_bytes(good)
    check_job(path)


def test_newer_version(path):
    with closing(sqlite3.connect(path)) as db:
        [[version]] = db.execute('pragma user_version')
        db.execute(f'pragma user_version = {version + 1}')
    refuse(path, f'its version {version + 1} is newer than {version}, .*: upgrade pyams_zmq')
    with closing(sqlite3.connect(path)) as db:
        db.execute(f'pragma user_version = {version}')
    check_job(path)


@pytest.mark.parametrize('is_there', [True, False])
def test_read_only_folder(path, tmp_path, is_there):
    def check():
        mount('--bind', tmp_path, tmp_path)
        mount('-o', 'remount,bind,ro', tmp_path)
        journal = path if is_there else tmp_path / 'new.jobs'
        refuse(journal, 'Read-only file system.*be able to write to its folder')

    run_unshared(check)
    check_job(path)


def check_start_on_full_disk(disk):
    ballast = Ballast(disk)
    ballast.fill()
    refuse(disk / 'x.jobs', 'full')
    ballast.remove()
    with asking(disk / 'x.jobs') as (_pool, asker):
        assert asker.run('add', [1])['state'] == 'done'


def test_start_on_full_disk(tmp_path):
    run_on_small_disk(check_start_on_full_disk, tmp_path)


def test_supervised_service_starts_when_its_journal_can_be_used(path, address, ask, service_log):
    good = path.read_bytes()
    path.write_bytes(b'no journal' * 1000)
    supervisor = SupervisorProcess({'jobs': partial(make_pool, path, address)})
    supervisor.start()
    try:
        wait_until(lambda: 'cannot be used: it is damaged' in service_log(), TIMEOUT)
        new = path.with_name('new')
        new.write_bytes(good)
        new.replace(path)
        assert ask(address, ['ping', None], timeout=TIMEOUT)[0] == 200
        with Asker(address) as asker:
            assert asker.wait('mine')['reply'] == [200, 3]
    finally:
        supervisor.stop()


# While it serves


def check_refused(asker):
    status, text = asker.ask('add', LARGE)
    assert status == 507
    assert text.startswith('The journal cannot be written: ')
    assert text.endswith('; try again later')


def problem_of(pool):
    with suppress(ZMQTimeoutError):  # its broker is being replaced
        return pool.stats()['jobs']['problem']


def check_full_disk(disk, is_killed):
    """Submits are refused; calls and the job that runs go on, and then the others."""
    hold, log = disk.parent / 'hold', disk.parent / 'log'
    hold.touch()
    ballast = Ballast(disk)
    with asking(disk / 'x.jobs') as (pool, asker):
        asker.submit('work', {'path': str(hold), 'log': str(log)}, id='held')
        lines_of(log)
        accepted = [asker.submit('add', LARGE) for _number in range(3)]
        ballast.fill()
        check_refused(asker)
        with ZMQClient(pool.bound_address) as client:
            with pytest.raises(ZMQRemoteError, match='507 The journal cannot be written') as raised:
                client.submit('add', LARGE)
            assert raised.value.status == 507
            assert client.jobs(state='waiting', limit=1)[0].id == accepted[-1]
        assert problem_of(pool)
        if is_killed:
            pid = pool.stats()['pid']
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: asker.ask('pyams_zmq.stats')[1]['pid'] != pid, TIMEOUT)
        hold.unlink()
        assert asker.ask('ping')[0] == 200
        check_refused(asker)
        ballast.remove()
        assert asker.wait('held')['reply'][1][0] == 1
        for job_id in accepted:
            assert asker.wait(job_id)['reply'] == [200, 0]
        wait_until(lambda: problem_of(pool) == '', TIMEOUT)
        assert asker.run('add', [1])['state'] == 'done'
    assert len(lines_of(log)) == 1


@pytest.mark.parametrize('is_killed', [False, True])
def test_full_disk(tmp_path, is_killed, service_log):
    run_on_small_disk(check_full_disk, tmp_path, is_killed)
    log = service_log()
    assert log.count('no job is accepted until it can') == 1 + is_killed  # once for each broker
    assert log.count('can be written again') == 1


@pytest.mark.parametrize('name', ['pyams_zmq.job.cancel', 'pyams_zmq.job.retry'])
def test_client_that_floods_the_journal(path, monkeypatch, name):
    """It gets 503 while the disk is slow, and leaves room for others."""
    monkeypatch.setattr('pyams_zmq.jobs.journal_file.BUSY_TIMEOUT', TIMEOUT)
    monkeypatch.setattr('pyams_zmq.jobs.writer.MAX_BACKLOG', 50_000)
    with (
        asking(path) as (pool, asker),
        RawPeer(pool.bound_address) as greedy,
        RawPeer(pool.bound_address) as modest,
        closing(sqlite3.connect(path, isolation_level=None)) as db,
    ):
        asker.wait('mine')
        asker.submit('add', [1], id='later', delay=600)
        db.execute('begin immediate')  # the disk is slow
        for _number in range(100):
            greedy.send(request(name, 'later'))
        assert greedy.read_reply()[0] == 503
        greedy.send(request('pyams_zmq.job', 'later'))
        while greedy.read_reply()[0] != 200:
            pass
        for message in (name, 'later'), ('add', [1, 2]), ('pyams_zmq.job', 'later'):
            modest.send(request(*message))
        assert modest.read_reply()[1]['state'] == 'waiting'  # and no 503 before it
        db.execute('rollback')
        assert [modest.read_reply()[0] for _number in range(2)] == [409, 202]


@pytest.mark.parametrize('is_stuck', [False, True])
def test_end_of_a_service_that_accepts_no_job(is_stuck):
    """It waits for the ends of jobs as long as they can be written."""
    writer = SimpleNamespace(unanswered=0, problem='its jobs take too much', is_stuck=is_stuck)
    book = SimpleNamespace(live={}, unrecorded=1)
    service = SimpleNamespace(_writer=writer, book=book)
    assert JobService.is_busy.fget(service) is not is_stuck


def test_file_that_is_removed_while_it_is_used(path):
    """What is accepted would be lost: nothing is, until the service is started again."""
    with asking(path) as (_pool, asker):
        path.rename(path.with_name('moved'))
        status, text = asker.ask('add', [1])
        assert (status, text) == (
            507,
            'The journal cannot be written: No such file or directory; try again later',
        )
        assert asker.ask('ping')[0] == 200
        path.with_name('moved').rename(path)
        assert asker.run('add', [1])['state'] == 'done'
