# SPDX-License-Identifier: ZPL-2.1
"""The command line as the first process of a container (PID 1)."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from app.external import INI
from app.program import Program, is_running
from checks import TIMEOUT, wait_until
from pyams_zmq.client import ZMQClient

UNSHARE = ('unshare', '--pid', '--fork', '--mount-proc', '--kill-child')

WAITS_WHEN_IT_IS_LOADED = """
import sys, threading
from pyams_zmq.cli import main, serve
def load(*args):
    print('1', flush=True)
    threading.Event().wait()
serve.load_application = load
sys.exit(main(['serve', 'x.ini', 'echo']))
"""


class Container(Program):
    """A Python program that is PID 1; its `pid` is that outside."""

    def __init__(self, folder, *args, **env):
        self.log = folder / 'log'
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(
                [*UNSHARE, sys.executable, '-W', 'ignore:pkg_resources is deprecated', *args],
                cwd=folder,
                env=self.environ(folder, **env),
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        unshare = psutil.Process(self.process.pid)
        [first] = wait_until(unshare.children)
        self.pid = first.pid

    def execute(self, script):
        """Run a shell script in the container, as `docker exec` does; return its exit code."""
        command = ('nsenter', '--target', str(self.pid), '--pid', '--mount', 'sh', '-c', script)
        return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode

    def leave_orphan(self, path):
        """Run a program that ends later than its parent; return its pid in the container."""
        self.execute(f"sh -c 'sleep 0.1; echo $$ > {path}.new; mv {path}.new {path}' &")
        wait_until(path.exists)
        return int(path.read_text())

    def has(self, pid):
        """Return True if there is a process in the container, or its exit code."""
        return self.execute(f'test -d /proc/{pid}') == 0

    def children(self):
        """Return names and states of its children."""
        found = {}
        for child in psutil.Process(self.pid).children():
            with suppress(psutil.NoSuchProcess):  # it ends just now
                found.setdefault(child.name(), []).append(child.status())
        return found

    def end(self):
        """Kill it, and with it the container."""
        if is_running(self.pid):
            os.kill(self.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(autouse=True)
def _allowed():
    if subprocess.run([*UNSHARE, 'true'], check=False, capture_output=True).returncode:
        pytest.skip('a PID namespace of its own is not allowed here')


@pytest.fixture
def address(tmp_path):
    return f'ipc://{tmp_path}/echo'


@pytest.fixture
def serve(tmp_path, run_program):
    ini = tmp_path / 'application.ini'
    ini.write_text(INI.format(folder=tmp_path, setting=f'app.address = ipc://{tmp_path}/'))
    return run_program('-m', 'pyams_zmq', 'serve', str(ini), 'echo', factory=Container)


def ask(address):
    with patient_client(address) as client:
        return client.call('pid')


def patient_client(address):
    """Return a client that waits until the container is up."""
    client = ZMQClient(address, timeout=TIMEOUT)
    client.connect_timeout = TIMEOUT
    return client


def test_orphans(serve, address, tmp_path):
    """It collects those that end, while it has nothing else to do; others live on."""
    first = ask(address)
    serve.execute('sleep 3600 & sleep 0 &')
    wait_until(lambda: serve.children().get('sleep') == [psutil.STATUS_SLEEPING])
    orphan = serve.leave_orphan(tmp_path / 'orphan')
    wait_until(lambda: not serve.has(orphan))
    serve.execute(f'kill -9 {first}')
    assert wait_until(lambda: (pid := ask(address)) != first and pid)
    assert serve.children()['sleep'] == [psutil.STATUS_SLEEPING]


def test_what_a_process_leaves_behind(serve, address):
    """A program that a handler has started ends, although it is an orphan, too."""
    with patient_client(address) as client:
        first = client.call('pid')
        client.call('run_program')
        serve.execute(f'kill -9 {first}')
    wait_until(lambda: 'sleep' not in serve.children())
    assert ask(address) != first


@pytest.mark.parametrize('num', [signal.SIGTERM, signal.SIGINT])
def test_end(serve, address, num):
    ask(address)
    serve.send_signal(num)
    assert serve.process.wait(TIMEOUT) == 0
    assert 'echo has ended with exit code 0' in serve.log.read_text()
    assert not Path(address.removeprefix('ipc://')).exists()


def test_second_signal(serve, address, tmp_path):
    """The second one ends it at once, as elsewhere."""
    with patient_client(address) as client:
        client.call('pid')
        client.send('wait_for', f'{tmp_path}/busy')
        wait_until((tmp_path / 'busy').exists)
        wait_until(lambda: _has_ended_by_a_signal(serve))
        assert serve.process.wait(TIMEOUT) == 128 + signal.SIGTERM


def _has_ended_by_a_signal(program):
    if program.process.poll() is None and is_running(program.pid):
        program.send_signal(signal.SIGTERM)
        return False
    return True


def test_signal_while_the_application_is_loaded(run_program):
    program = run_program('-c', WAITS_WHEN_IT_IS_LOADED, factory=Container)
    assert program.read() == 1
    program.send_signal(signal.SIGTERM)
    assert program.process.wait(TIMEOUT) == 128 + signal.SIGTERM


def test_worker(run_program, tmp_path):
    """Workers of a pool that is not there yet."""
    worker = ('-m', 'pyams_zmq', 'worker', 'tcp://127.0.0.1:1', 'handlers.MessageHandler')
    program = run_program(*worker, factory=Container)
    wait_until(lambda: 'worker 1 is process' in program.log.read_text())
    orphan = program.leave_orphan(tmp_path / 'orphan')
    wait_until(lambda: not program.has(orphan))
    program.send_signal(signal.SIGTERM)
    assert program.process.wait(TIMEOUT) == 0
