# SPDX-License-Identifier: ZPL-2.1
"""The folder of the locks of a user."""

import os

import pytest

from checks import TIMEOUT
from pyams_zmq.process import lock_folder as module
from pyams_zmq.process.lock_folder import UserLock, identify_mounts
from pyams_zmq.supervisor import SupervisorProcess


def test_folder_does_not_depend_on_the_environment(run_program, tmp_path):
    code = (
        'from pyams_zmq.process.lock_folder import UserLock as L; print(f\'["{L(str()).path}"]\')'
    )
    program = run_program('-c', code, TMPDIR=str(tmp_path))
    assert program.read(TIMEOUT) == [UserLock('').path]


def test_folder_that_is_not_safe(lock_folder, tmp_path, monkeypatch):
    """One that is missing, or in which other users can rename our folder, is not used."""
    for folder in (tmp_path / 'missing', tmp_path):
        monkeypatch.setattr(module, '_FOLDER', str(folder))
        assert UserLock('x').path.startswith(f'{lock_folder}/')


@pytest.mark.parametrize('kind', ['open', 'link', 'stranger'])
def test_folder_of_locks(lock_folder, monkeypatch, kind):
    if kind == 'link':
        lock_folder.with_name('elsewhere').mkdir(mode=0o700)
        lock_folder.symlink_to('elsewhere')
    else:
        lock_folder.mkdir(mode=0o700)
        UserLock('free')
    if kind == 'open':
        lock_folder.chmod(0o750)
    if kind == 'stranger':
        user = os.geteuid()
        lock_folder.rename(lock_folder.with_name(f'pyams_zmq-{user + 1}'))
        monkeypatch.setattr(os, 'geteuid', lambda: user + 1)
    supervisor = SupervisorProcess({}, lock='theirs')
    with pytest.raises(PermissionError, match='must be a folder of this user') as caught:
        supervisor.start()
    assert f'{supervisor.name} cannot start: ' in str(caught.value)
    assert 'set TMPDIR' in str(caught.value)


def test_mounts_without_the_folder(tmp_path, monkeypatch):
    """They have a number in the kernel, if /proc shows that."""
    here = identify_mounts()
    monkeypatch.setattr(module, '_FOLDER', str(tmp_path))
    assert identify_mounts() != here
    monkeypatch.setattr(module, '_FOLDER', str(tmp_path / 'missing'))
    assert identify_mounts() == f' {os.readlink("/proc/self/ns/mnt")}'
    monkeypatch.setattr(module, '_MOUNTS', str(tmp_path / 'missing'))
    assert identify_mounts() == ''


def test_working_folder_is_not_for_locks(lock_folder, monkeypatch):
    """Python takes it if no other folder is writable; it differs from program to program."""
    monkeypatch.chdir(lock_folder.parent)
    monkeypatch.delenv('TMPDIR', raising=False)
    with pytest.raises(FileNotFoundError, match='no folder for temporary files is writable'):
        UserLock('x')
    assert not lock_folder.exists()
    monkeypatch.setenv('TMPDIR', str(lock_folder.parent))
    assert UserLock('x').path.startswith(f'{lock_folder}/')
