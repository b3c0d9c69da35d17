# SPDX-License-Identifier: ZPL-2.1
"""The name of a process in ps and top."""

import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from checks import TIMEOUT, in_fork, started, wait_until
from handlers import Process
from pool_handlers import Pool
from pyams_zmq.process.title import set_title, shorten
from pyams_zmq.supervisor import SupervisorProcess


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('converter', 'converter'),
        ('converter-of-all-medias', 'converter-of-al'),
        ('converter broker', 'converte broker'),
        ('converter worker 2', 'conver worker 2'),
        ('converter worker 12', 'conve worker 12'),
        ('pyams_zmq supervisor', 'pyam supervisor'),
        ('converter supervisor of all', 'con supervisor'),
        ('ééé worker 2222', 'é worker 2222'),
        ('ÿÿÿÿÿÿÿÿÿ', 'ÿÿÿÿÿÿÿ'),
        ('\ud800', '?'),
    ],
)
def test_first_bytes(name, expected):
    assert shorten(name).decode() == expected


def title_of(process):
    """Return the name and the command line of a process."""
    comm = Path(f'/proc/{process.pid}/comm').read_text(encoding='utf-8').removesuffix('\n')
    return comm, ' '.join(process.cmdline()).rstrip()


def check(name, comm, title):
    set_title(name)
    found = Path('/proc/self/cmdline').read_bytes().rstrip(b'\0').decode()
    sys.exit((Path('/proc/self/comm').read_text(), found) != (f'{comm}\n', title))


@pytest.mark.parametrize(
    ('name', 'comm', 'title'),
    [
        ('convert worker 2', 'conver worker 2', 'pyams_zmq: convert worker 2'),
        ('pyams_zmq supervisor', 'pyam supervisor', 'pyams_zmq supervisor'),
        ('two\nlines', 'two?lines', 'pyams_zmq: two?lines'),
        ('x' * 1000, 'x' * 15, f'pyams_zmq: {"x" * 200}'),
    ],
)
def test_title(name, comm, title):
    assert in_fork(partial(check, name, comm, title)) == 0


def test_without_the_distribution(monkeypatch):
    monkeypatch.setitem(sys.modules, 'setproctitle', None)
    command = Path('/proc/self/cmdline').read_bytes().rstrip(b'\0').decode()
    assert in_fork(partial(check, 'converter', 'converter', command)) == 0


def test_processes_of_a_supervisor(tmp_path):
    """Each has the name of its service, and processes of a pool have their role."""
    factories = {
        'indexer': partial(Process, f'ipc://{tmp_path}/indexer'),
        'converter': partial(Pool, f'ipc://{tmp_path}/converter'),
    }
    supervisor = SupervisorProcess(factories)
    supervisor.name = 'pyams_zmq supervisor'
    with started(supervisor):
        parent = psutil.Process(supervisor.pid)
        names = ['converter', 'converter broker', 'converter worker 1', 'converter worker 2']
        titles = [f'pyams_zmq: {name}' for name in (*names, 'indexer')]

        def find():
            found = [title_of(each) for each in parent.children(recursive=True)]
            found.sort(key=lambda each: each[1])
            return found if [title for _name, title in found] == titles else None

        found = wait_until(find, TIMEOUT)
        assert [name for name, _title in found] == [
            *('converter', 'converte broker', 'conver worker 1', 'conver worker 2', 'indexer'),
        ]
        assert title_of(parent) == ('pyam supervisor', 'pyams_zmq supervisor')


def test_process_without_a_supervisor(tmp_path):
    """A sibling package starts such ones: they keep the name of multiprocessing."""
    process = Process(f'ipc://{tmp_path}/own')
    assert process.name.startswith('Process-')
    with started(process):
        process.wait_ready(TIMEOUT)
        expected = process.name[:15], f'pyams_zmq: {process.name}'
        assert title_of(psutil.Process(process.pid)) == expected
