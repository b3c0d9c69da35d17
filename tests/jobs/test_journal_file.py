# SPDX-License-Identifier: ZPL-2.1
"""Which file a journal may be, and what is said about one that cannot be used."""

import gc
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from functools import partial
from multiprocessing.context import ForkProcess
from pathlib import Path
from threading import Timer

import pytest

from checks import TIMEOUT, open_fds
from journals import Bench
from namespaces import mount, run_unshared
from pyams_zmq.exceptions import ZMQJournalError, ZMQStartError
from pyams_zmq.jobs import journal_file, schema
from pyams_zmq.jobs.journal import Journal
from pyams_zmq.jobs.journal_file import find_network_mount

NOBODY = 65534


def refuse(path, **options):
    """Return why a journal is refused; nothing of it is left open or locked."""
    before = open_fds()
    with pytest.raises(ZMQJournalError) as info:
        Journal(str(path), **options)
    assert open_fds() == before
    assert isinstance(info.value, ZMQStartError)
    assert info.value.path == os.path.realpath(path)
    assert str(info.value).startswith(f'The journal {info.value.path} cannot be used: ')
    return info.value.reason


def run_in_fork(function, *args):
    child = ForkProcess(target=function, args=args)
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == 0


def test_new_file(path):
    mask = os.umask(0)
    try:
        bench = Bench(path)
        bench.accept('a')
    finally:
        os.umask(mask)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == [
        'converter.jobs',
        'converter.jobs-shm',
        'converter.jobs-wal',
        'converter.jobs.lock',
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    bench.close()
    bench.close()
    assert sorted(file.name for file in path.parent.iterdir()) == [
        'converter.jobs',
        'converter.jobs.lock',
    ]


def test_files_that_others_could_read(path):
    ready, end = os.pipe(), os.pipe()

    def leave_open():
        bench = Bench(path)
        bench.accept('a')
        for file in path.parent.iterdir():
            file.chmod(0o666)
        os.write(ready[1], b'x')
        os.read(end[0], 1)

    child = ForkProcess(target=leave_open)
    child.start()
    os.read(ready[0], 1)
    child.kill()
    child.join()
    for fd in ready + end:
        os.close(fd)
    bench = Bench(path)
    assert bench.states() == {'a': 'waiting'}
    files = [file for file in path.parent.iterdir() if file.suffix != '.lock']
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    bench.close()


@pytest.mark.parametrize('name', ['a b', 'ü?mode=ro', '100%', 'a#b', '-x', ':memory:'])
def test_any_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = Bench(name)
    bench.accept('a')
    assert bench.journal.path == os.path.realpath(name)
    bench.reopen()
    assert bench.states() == {'a': 'waiting'}
    bench.close()
    assert sorted(os.listdir()) == sorted([name, f'{name}.lock'])


def test_name_that_is_not_text(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b'/\xff')
    bench = Bench(path)
    bench.accept('a')
    bench.close()
    assert os.path.exists(path)


@pytest.mark.parametrize('is_there', [True, False])
def test_symbolic_link(tmp_path, is_there):
    disk = tmp_path / 'disk'
    disk.mkdir()
    if is_there:
        Bench(disk / 'jobs').close()
    link = tmp_path / 'link'
    link.symlink_to('disk/jobs')
    bench = Bench(link)
    assert 'another broker' in refuse(disk / 'jobs')
    assert bench.journal.path == str(disk / 'jobs')
    bench.close()
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ['disk', 'link']


@pytest.mark.parametrize('keep', [0, -1, True, 'week', float('nan')])
def test_bad_keep(path, keep):
    with pytest.raises(ValueError, match='Bad keep'):
        Journal(str(path), keep)
    assert not path.exists()


def test_folder_that_is_missing(tmp_path):
    reason = refuse(tmp_path / 'var' / 'jobs')
    assert 'does not exist: make it' in reason


@pytest.mark.parametrize('kind', ['folder', 'fifo', 'folder is a file'])
def test_other_kinds_of_files(path, kind):
    if kind == 'folder':
        path.mkdir()
        expected = 'it is a folder: name a file in it'
    elif kind == 'fifo':
        os.mkfifo(path)
        expected = 'not a regular file'
    else:
        path.touch()
        path /= 'jobs'
        expected = 'does not exist'
    assert expected in refuse(path)


def fill(path):
    """Make a journal with some pages."""
    bench = Bench(path)
    for number in range(50):
        bench.accept(str(number), frames=[bytes(2000)])
    bench.close()


@pytest.mark.parametrize('at', [0, 4096, 3 * 4096, 10 * 4096])
def test_damaged_file(path, at):
    fill(path)
    data = bytearray(path.read_bytes())
    data[at : at + 4096] = b'\x55' * 4096
    path.write_bytes(data)
    reason = refuse(path)
    assert 'it is damaged' in reason
    assert 'restore a backup' in reason
    assert path.read_bytes() == data


def test_damage_that_the_check_does_not_reach(path, monkeypatch):
    fill(path)
    monkeypatch.setattr('pyams_zmq.jobs.journal._CHECK_STEPS', 1)
    monkeypatch.setattr('pyams_zmq.jobs.journal._CHECK_TIME', -1)
    good = path.read_bytes()
    refused = 0
    for at in range(0, len(good), 4096):
        path.write_bytes(good[:at] + b'\x55' * 4096 + good[at + 4096 :])
        try:
            Journal(str(path)).close()
        except ZMQJournalError:
            refused += 1
    assert refused > 3


def test_truncated_file(path):
    fill(path)
    os.truncate(path, path.stat().st_size // 2)
    assert 'it is damaged' in refuse(path)


@pytest.mark.parametrize('text', [b'hello', b'x' * 5000])
def test_file_that_is_not_a_database(path, text):
    path.write_bytes(text)
    assert 'not a journal' in refuse(path)
    assert path.read_bytes() == text


@pytest.mark.parametrize('pragma', ['application_id = 7', 'user_version = 7', 'encoding = "UTF-8"'])
def test_database_of_another_application(path, pragma):
    with closing(sqlite3.connect(path)) as db:
        db.execute(f'pragma {pragma}')
        db.execute('create table job(id)')
    data = path.read_bytes()
    assert 'a file of another application: name a file that does not exist' in refuse(path)
    assert path.read_bytes() == data


def test_empty_database_becomes_a_journal(path):
    with closing(sqlite3.connect(path)) as db:
        db.execute('pragma journal_mode = wal')
    bench = Bench(path)
    assert bench.accept('a').is_new
    bench.close()


def test_newer_version(path):
    fill(path)
    version = len(schema.MIGRATIONS) + 1
    with closing(sqlite3.connect(path)) as db:
        db.execute(f'pragma user_version = {version}')
    reason = refuse(path)
    assert f'its version {version} is newer than {version - 1}' in reason
    assert 'upgrade pyams_zmq' in reason


def test_next_version(path, monkeypatch):
    fill(path)

    def add_column(db):
        db.execute('alter table job add column colour text')

    def fail(db):
        db.execute('alter table job add column size text')
        raise sqlite3.OperationalError('disk is full')

    def fail_outside(db):
        db.execute('rollback')
        raise sqlite3.OperationalError('disk is full')

    for step in (fail, fail_outside):
        monkeypatch.setattr(schema, 'MIGRATIONS', [*schema.MIGRATIONS[:1], add_column, step])
        assert 'disk is full' in refuse(path)
    monkeypatch.setattr(schema, 'MIGRATIONS', schema.MIGRATIONS[:2])
    bench = Bench(path)
    assert len(bench.states()) == 50
    columns = [row[1] for row in bench.journal._db.execute('pragma table_info(job)')]
    assert 'colour' in columns
    assert 'size' not in columns
    bench.reopen()
    bench.close()


@pytest.mark.parametrize('statement', range(len(schema._TABLES)))
def test_kill_while_the_tables_are_made(path, statement, monkeypatch):
    tables = (*schema._TABLES[:statement], 'kill', *schema._TABLES[statement:])

    def make():
        def create(db):
            for text in tables:
                if text == 'kill':
                    os.kill(os.getpid(), signal.SIGKILL)
                db.execute(text)

        schema.MIGRATIONS[0] = create
        Bench(path)

    child = ForkProcess(target=make)
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == -signal.SIGKILL
    bench = Bench(path)
    assert bench.accept('a').is_new
    bench.close()


def test_check_of_a_large_file_takes_a_limited_time(path, monkeypatch):
    fill(path)
    monkeypatch.setattr('pyams_zmq.jobs.journal._CHECK_STEPS', 1)
    monkeypatch.setattr('pyams_zmq.jobs.journal._CHECK_TIME', -1)
    Bench(path).close()


class BadDisk(sqlite3.Connection):
    """A database of which a page cannot be read."""

    def execute(self, text, *args):
        if 'quick_check' in text:
            raise sqlite3.OperationalError('disk I/O error')
        return super().execute(text, *args)


def test_page_that_cannot_be_read(path, monkeypatch):
    fill(path)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, 'connect', partial(connect, factory=BadDisk))
    assert 'disk I/O error' in refuse(path)


LOCKER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('pragma locking_mode = exclusive')
db.execute('begin exclusive')
print('locked', flush=True)
sys.stdin.read()
"""


def test_file_that_another_program_has_locked(path, monkeypatch):
    fill(path)
    monkeypatch.setattr(journal_file, 'BUSY_TIMEOUT', 0.01)
    command = [sys.executable, '-c', LOCKER, path]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == b'locked\n'
        assert 'let no other program lock the file' in refuse(path)
        other.stdin.close()


def test_file_system_without_shared_memory(path, monkeypatch):
    """A database in memory has no write-ahead log either."""
    monkeypatch.setattr(journal_file, 'quote', lambda _path: 'x')
    monkeypatch.setattr(
        journal_file.JournalFile, 'connect', lambda _self, _mode: sqlite3.connect(':memory:')
    )
    monkeypatch.setattr(journal_file.JournalFile, 'disconnect', lambda _self, db: db.close())
    assert 'no shared memory' in refuse(path)


# Two brokers


def test_second_broker(path):
    bench = Bench(path)
    assert 'another broker uses it: stop that one' in refuse(path)
    run_in_fork(refuse, path)
    bench.accept('a')
    bench.reopen()
    assert bench.states() == {'a': 'waiting'}
    bench.close()


def test_next_broker_waits_for_the_former_one(path):
    bench = Bench(path)
    timer = Timer(0.2, bench.close)
    timer.start()
    Journal(str(path), lock_timeout=TIMEOUT).close()
    timer.join()


def test_next_broker_after_a_kill(path):
    ready, ready_end = os.pipe()

    def serve():
        bench = Bench(path)
        bench.begin('a')
        os.write(ready_end, b'x')
        signal.pause()

    child = ForkProcess(target=serve)
    child.start()
    os.read(ready, 1)
    child.kill()
    journal = Journal(str(path), lock_timeout=TIMEOUT)
    child.join()
    assert [job.id for job in journal.reader.running()] == ['a']
    journal.close()
    os.close(ready)
    os.close(ready_end)


def test_forks_keep_neither_the_lock_nor_damage_the_file(path):
    """A child may outlive the broker, and collect its garbage."""
    bench = Bench(path)
    bench.accept('a')
    receiver, sender = os.pipe()

    def collect():
        bench.journal = None
        gc.collect()
        files = {file for _fd, file in open_fds()}
        os.write(sender, b'kept' if str(path) in files else b'closed')
        signal.pause()

    child = ForkProcess(target=collect)
    child.start()
    try:
        assert os.read(receiver, 9) == b'kept'  # sqlite does not allow to close it there
        bench.accept('b')
        with closing(sqlite3.connect(path)) as other:  # would corrupt it if the locks were gone
            assert other.execute('select count(*) from job').fetchone() == (2,)
        assert path.with_name('converter.jobs-wal').exists()
        bench.accept('c')
        bench.reopen()
        assert list(bench.states()) == ['a', 'b', 'c']
        bench.close()
    finally:
        child.kill()
        child.join()
        os.close(receiver)
        os.close(sender)


def test_sqlite_program_beside_a_broker(path):
    """An operator looks at the file with another program."""
    bench = Bench(path)
    bench.accept('a')
    script = (
        'import sqlite3, sys\n'
        'db = sqlite3.connect(sys.argv[1])\n'
        "print(db.execute('select id, state from job').fetchall())\n"
        'db.close()\n'
    )
    for _ in range(2):
        command = [sys.executable, '-c', script, path]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        assert result.stdout == "[('a', 'waiting')]\n"
    bench.accept('b')
    bench.reopen()
    assert list(bench.states()) == ['a', 'b']
    bench.close()


# File systems

MOUNTS = r"""
22 27 0:21 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:22 / /proc rw - proc proc rw
24 22 0:23 / /srv rw,relatime shared:2 master:3 - nfs4 server:/srv rw,addr=10.0.0.1
25 24 0:24 / /srv/local rw - xfs /dev/sdb1 rw
26 22 0:25 / /mnt/my\040share rw - cifs //server/share rw
27 22 0:26 / /mnt/over rw - nfs server:/over rw
28 27 0:27 / /mnt/over rw - tmpfs tmpfs rw
29 22 0:28 / /mnt/ssh rw - fuse.sshfs me@host: rw
30 22 0:29 / /mnt/ntfs rw - fuseblk /dev/sdc1 rw
31 22 0:30 / /mnt/merged rw - fuse.mergerfs a:b rw
32 22 0:31 / /mnt/host rw - 9p share rw
33 22 0:32 / /mnt/smb rw - smb3 //server/share rw
34 22 0:33 / /mnt/gluster rw - fuse.glusterfs server:/vol rw
broken line
35 22 0:34 / /mnt/ceph rw - ceph mon:/ rw
36 22 0:35 / /mnt/lustre rw - lustre mgs@tcp:/fs rw
37 22 0:36 / /mnt/afs rw - afs none rw
""".strip()


@pytest.mark.parametrize(
    ('folder', 'expected'),
    [
        ('/', None),
        ('/var/lib', None),
        ('/srv', ('/srv', 'nfs4')),
        ('/srv/app/var', ('/srv', 'nfs4')),
        ('/srvother', None),
        ('/srv/local', None),
        ('/srv/local/app', None),
        ('/srv/localhost', ('/srv', 'nfs4')),
        ('/mnt/my share/app', ('/mnt/my share', 'cifs')),
        ('/mnt/over/app', None),
        ('/mnt/ssh', ('/mnt/ssh', 'fuse.sshfs')),
        ('/mnt/ntfs', None),
        ('/mnt/merged', None),
        ('/mnt/host/x', ('/mnt/host', '9p')),
        ('/mnt/smb/x', ('/mnt/smb', 'smb3')),
        ('/mnt/gluster/x', ('/mnt/gluster', 'fuse.glusterfs')),
        ('/mnt/ceph', ('/mnt/ceph', 'ceph')),
        ('/mnt/lustre', ('/mnt/lustre', 'lustre')),
        ('/mnt/afs', ('/mnt/afs', 'afs')),
    ],
)
def test_network_file_systems(folder, expected):
    assert find_network_mount(MOUNTS, folder) == expected


def test_root_on_the_network():
    text = '1 0 0:1 / / rw - nfs server:/ rw\n2 1 0:2 / /var rw - ext4 /dev/sda rw'
    assert find_network_mount(text, '/srv') == ('/', 'nfs')
    assert find_network_mount(text, '/var/lib') is None
    assert find_network_mount('', '/srv') is None


def test_journal_on_the_network(path, monkeypatch, tmp_path):
    mounts = tmp_path / 'mountinfo'
    folder = str(path.parent).replace('/', '/')
    text = Path('/proc/self/mountinfo').read_text(encoding='utf-8')
    mounts.write_text(f'{text}99 1 0:9 / {folder} rw - nfs4 server:/x rw\n', encoding='utf-8')
    monkeypatch.setattr(journal_file, '_MOUNTINFO', str(mounts))
    reason = refuse(path)
    assert re.search(r'is a network file system \(nfs4\)', reason)
    assert 'a disk of this machine' in reason
    assert not path.exists()


def test_system_without_mountinfo(path, monkeypatch):
    monkeypatch.setattr(journal_file, '_MOUNTINFO', '/nowhere/mountinfo')
    Bench(path).close()


@pytest.mark.parametrize('is_there', [True, False])
def test_read_only_file_system(tmp_path, is_there):
    """Also root may not write to it."""
    path = tmp_path / 'jobs'
    if is_there:
        fill(path)

    def check():
        mount('--bind', tmp_path, tmp_path)
        mount('-o', 'remount,bind,ro', tmp_path)
        assert 'let this user own the file and be able to write to its folder' in refuse(path)

    run_unshared(check)


@pytest.mark.parametrize('case', ['folder', 'folder with files', 'file', 'file of another user'])
def test_no_permission(path, case):
    if os.geteuid() != 0:
        pytest.skip('only root may become another user')
    if case != 'folder':
        fill(path)
        for file in path.parent.iterdir():
            os.chown(file, NOBODY, NOBODY)
    if case.startswith('folder'):
        path.parent.chmod(0o555)
    else:
        path.parent.chmod(0o777)
    if case == 'file':
        path.chmod(0o400)
    elif case == 'file of another user':
        os.chown(path, 0, 0)
        path.chmod(0o666)

    def check():
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        assert 'let this user own the file' in refuse(path)

    run_in_fork(check)
    path.parent.chmod(0o700)


def test_file_that_was_removed(bench, path):
    """What is written to it would be lost."""
    bench.accept('a')
    path.unlink()
    with pytest.raises(FileNotFoundError):
        bench.accept('b')
    fill(path.with_name('other'))
    path.with_name('other').rename(path)
    with pytest.raises(FileNotFoundError, match='it was replaced'):
        bench.accept('b')


def test_lock_that_was_removed(bench, path):
    path.with_name('converter.jobs.lock').unlink()
    bench.accept('a')
    assert 'another broker' in refuse(path)
