# SPDX-License-Identifier: ZPL-2.1
"""Jobs for clients in C and for Node, beside ours; `.ci/run` installs what they need."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checks import TIMEOUT, wait_until
from job_checks import Asker

CLIENTS = Path(__file__).parents[2] / 'examples' / 'job_clients'
C_FLAGS = ['-std=c99', '-Wall', '-Wextra', '-Werror', '-O2']
CODE_OF_ZMQ = '#include <zmq.h>\nint main(void) { return !zmq_ctx_new(); }'


def works(*command, text=''):
    """Return True if a command can be run without an error."""
    if shutil.which(command[0]) is None:
        return False
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    return done.returncode == 0


def why_not():
    """Return what is missing for these clients, or None."""
    if not works('node', '-e', 'require("zeromq")'):
        return 'Node or its package zeromq is not installed'
    if not works('cc', '-x', 'c', '-', '-o', '/dev/null', '-lzmq', text=CODE_OF_ZMQ):
        return 'a C compiler or the headers of libzmq are not installed'
    return None


class Client:
    """A client that is not ours: a program that submits one job and watches it.

    :ivar lines: what it has printed
    """

    def __init__(self, *command):
        self.lines = []
        self._program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._reader = ThreadPoolExecutor(1)
        self._reading = self._reader.submit(self._read)

    def _read(self):
        with self._program as program:
            for line in program.stdout:
                self.lines.append(line.strip())

    @property
    def has_progress(self):
        return any(line.startswith('running ') for line in list(self.lines))

    def wait(self):
        """Wait for the end; return the exit code."""
        with self._reader:
            self._reading.result(TIMEOUT)
        return self._program.returncode

    def kill(self):
        self._program.kill()
        self.wait()


@pytest.fixture
def programs(tmp_path):
    """Return the commands of the clients, and a list of those that run."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    binary = tmp_path / 'client'
    source = CLIENTS / 'client.c'
    subprocess.run(['cc', *C_FLAGS, '-o', binary, source, '-lzmq'], check=True)
    started = []

    def start(*arguments):
        commands = (['node', CLIENTS / 'client.js'], [binary]) * 3
        started.extend(Client(*command, *arguments) for command in commands)
        return started[-6:]

    yield start
    for client in started:
        client.kill()


def test_clients_of_three_languages(programs, job_pool, tmp_path):
    """Each submits a job, watches it, and cancels another one, all at the same time."""
    pool = job_pool(workers=12, jobs=12)
    hold = tmp_path / 'hold'
    hold.touch()
    args = {'path': str(hold), 'log': str(tmp_path / 'log'), 'total': 1000}
    watching = programs(pool.bound_address, 'work', json.dumps(args))
    cancelling = programs(pool.bound_address, 'work', json.dumps(args), 'cancel')
    ours = [Asker(pool) for _number in range(3)]
    ids = [asker.submit('work', args) for asker in ours]
    for asker, job_id in zip(ours, ids, strict=True):
        asker.wait(job_id, until=lambda job: job['progress'])
        cancelled = asker.submit('work', args)
        assert asker.ask('pyams_zmq.job.cancel', cancelled) == [200, None]
        assert asker.wait(cancelled)['state'] == 'cancelled'
    for client in cancelling:
        assert client.wait() == 0
        assert client.lines[-2].startswith('cancelled')
        assert client.lines[-1] == 'null'
    wait_until(lambda: all(client.has_progress for client in watching), TIMEOUT)
    hold.unlink()
    for client in watching:
        assert client.wait() == 0
        assert client.lines[-2].startswith('done')
        assert client.lines[-1].startswith('[200,[1,')
    assert [asker.wait(job_id)['state'] for asker, job_id in zip(ours, ids, strict=True)] == [
        'done'
    ] * 3
    jobs = ours[0].ask('pyams_zmq.jobs')[1]
    for asker in ours:
        asker.client.close()
    assert sorted(job['state'] for job in jobs) == ['cancelled'] * 9 + ['done'] * 9
    assert {job['attempt'] for job in jobs} <= {0, 1}


def test_errors(programs, job_pool):
    """An error of the service is one of the program."""
    pool = job_pool()
    for client in programs(pool.bound_address, 'nobody', '[]'):
        assert client.wait() == 1
