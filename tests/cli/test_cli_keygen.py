# SPDX-License-Identifier: ZPL-2.1
"""`pyams_zmq keygen`."""

import os
import stat

import pytest

from handlers import Process
from pyams_zmq.curve import CurveServer
from pyams_zmq.testing import running


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """Let all users read and write new files, as far as the program allows it."""
    former = os.umask(0)
    yield
    os.umask(former)


@pytest.mark.usefixtures('umask')
def test_keys(run, tmp_path):
    folder = tmp_path / 'keys'
    code, out, err = run('keygen', str(folder), 'converter')
    assert (code, err) == (0, '')
    assert out == f'{folder}/converter.key\n{folder}/converter.key_secret\n'
    assert mode_of(folder) == 0o700
    assert [mode_of(path) for path in sorted(folder.iterdir())] == [0o600, 0o600]
    assert run('keygen', str(folder), 'web-app').code == 0
    assert len(list(folder.iterdir())) == 4


def test_call_with_the_keys(run, tmp_path):
    server, client = tmp_path / 'server', tmp_path / 'client'
    assert run('keygen', str(server), 'converter').code == 0
    assert run('keygen', str(client), 'operator').code == 0
    curve = CurveServer(str(server / 'converter.key_secret'), str(client))
    with running(Process('127.0.0.1:0', curve=curve)) as process:
        address = ('--address', process.bound_address, '--server-key', f'{server}/converter.key')
        right = run('call', *address, '--key', f'{client}/operator.key_secret', 'echo', '1')
        wrong = run('call', *address, '--key', f'{server}/converter.key_secret', 'echo', '1')
    assert right == (0, '1\n', '')
    assert (wrong.code, wrong.out) == (3, '')


@pytest.mark.parametrize('existing', ['a.key', 'a.key_secret'])
def test_existing_file(run, tmp_path, existing):
    (tmp_path / existing).write_text('mine')
    assert run('keygen', str(tmp_path), 'a') == (
        1,
        '',
        f'pyams_zmq: error: {tmp_path}/{existing} exists: choose another name; or move it away, '
        'then the peers need the new public key\n',
    )
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == 'mine'


def test_file_instead_of_a_folder(run, tmp_path):
    (tmp_path / 'keys').touch()
    code, out, err = run('keygen', str(tmp_path / 'keys'), 'a')
    assert (code, out) == (1, '')
    assert err.startswith(f'pyams_zmq: error: {tmp_path}/keys exists: choose another name')


def test_folder_in_which_nothing_can_be_made(run, tmp_path):
    assert run('keygen', f'{tmp_path}/no/keys', 'a') == (
        1,
        '',
        f'pyams_zmq: error: {tmp_path}/no/keys: No such file or directory: choose a folder in '
        'which you can write\n',
    )


@pytest.mark.parametrize('name', ['', '../a', 'a/b', '.a', '-', 'a b', 'a\n'])
def test_bad_name(run, tmp_path, name):
    code, out, err = run('keygen', str(tmp_path), '--', name)
    assert (code, out) == (2, '')
    assert f'error: bad name {name!r}: write letters' in err
    assert list(tmp_path.iterdir()) == []
