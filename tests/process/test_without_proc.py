# SPDX-License-Identifier: ZPL-2.1
"""A system without /proc, in a chroot for instance, or where it hides processes of others."""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial

import pytest
import zmq

from app.program import wait_for_end
from checks import AT_ONCE, TIMEOUT, wait_until
from handlers import Process
from namespaces import mount, run_unshared
from pool_handlers import Pool
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import ProcessDevice
from pyams_zmq.process import descendants as descendants_module
from pyams_zmq.process import service as service_module
from pyams_zmq.process.descendants import (
    OrphanCleanup,
    ProcessInfo,
    children,
    descendants,
    end_descendants,
    has_proc,
    subreaper,
)
from pyams_zmq.process.heartbeat import WAITING_TICKS, HeartbeatCounter, LivenessCheck
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.testing import running
from pyams_zmq.wire.memory import read_memory
from users import NOBODY, run_as

LEAVES_AN_ORPHAN = """
import subprocess
print(subprocess.Popen(['sleep', '60']).pid, flush=True)
"""


def hide_proc():
    """Hide /proc, and log to a file."""
    mount('-t', 'tmpfs', 'none', '/proc')
    assert not has_proc()


def check_service(factory, path):
    hide_proc()
    # Without /proc a search takes long, and beside other tests longer than this is by default.
    service_module.TERM_GRACE = 2.5
    logging.getLogger().handlers[:] = [logging.FileHandler(path / 'log')]
    with running(factory()) as process:
        with ZMQClient(process.bound_address) as client:
            assert client.call('echo', 1) == 1
            assert client.call('listeners_of_a_fork') == 0
            (path / 'program').write_text(str(client.call('run_program')))
        process.stop()
    assert process.exitcode == 0
    records = (path / 'log').read_text()
    assert records.count('/proc is not mounted, or belongs to another') == 1


@pytest.mark.parametrize('factory', [Process, partial(Pool, workers=2)], ids=['process', 'pool'])
def test_service(factory, tmp_path):
    """It serves, its programs end with it, and what is not possible is logged once."""
    run_unshared(check_service, factory, tmp_path)
    wait_for_end(int((tmp_path / 'program').read_text()), AT_ONCE)


def check_supervisor(address):
    hide_proc()
    supervisor = SupervisorProcess({'echo': partial(Process, address)})
    supervisor.start()
    with ZMQClient(address, timeout=TIMEOUT) as client:
        pid = client.call('pid')
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: _ask(client) not in (None, pid))
    supervisor.stop()
    assert supervisor.exitcode == 0


def _ask(client):
    with suppress(ConnectionError):
        return client.call('pid')
    return None


def test_supervisor(address):
    run_unshared(check_supervisor, address)


def check_device():
    hide_proc()
    device = ProcessDevice(zmq.QUEUE)
    device.bind_in('127.0.0.1')
    device.bind_out('127.0.0.1')
    device.context_factory = zmq.Context
    device.start()
    device.stop()
    assert device.done


def test_device():
    run_unshared(check_device)


def check_children():
    with subreaper():
        hide_proc()
        assert children() == set()
        with subprocess.Popen(
            [sys.executable, '-c', LEAVES_AN_ORPHAN], stdout=subprocess.PIPE
        ) as program:
            orphan = int(program.stdout.readline())
            assert {each.pid for each in children()} >= {program.pid}
        assert {each.pid for each in descendants()} == {orphan}
        cleanup = OrphanCleanup(set(), time.monotonic())
        wait_until(lambda: cleanup.step(time.monotonic()) is None)
        assert children() == set()
        with subprocess.Popen(['sleep', '60']) as program:
            end_descendants(5)
            assert program.wait() == -signal.SIGTERM
        assert ProcessInfo.read(program.pid) is None


def test_children():
    """Children are found, also those of others that this process has adopted."""
    run_unshared(check_children)


def check_child_that_computes():
    hide_proc()
    beat = HeartbeatCounter()
    beat.beat()
    with subprocess.Popen([sys.executable, '-c', 'while True: pass']) as program:
        check = LivenessCheck(beat, program.pid, 0.5)
        assert not check.check(1.0)
        for number in range(1, 10):
            end = ProcessInfo.read(program.pid).cpu_time + WAITING_TICKS
            wait_until(lambda end=end: ProcessInfo.read(program.pid).cpu_time > end)
            assert not check.check(1.0 + number)
        program.send_signal(signal.SIGSTOP)
        wait_until(lambda: check.check(check.due))
        program.kill()
    assert read_memory() > 1
    beat.close()


def test_child_that_computes():
    """The processor time is known: a process that computes does not hang."""
    run_unshared(check_child_that_computes)


def check_hidden_processes(address):
    mount('-t', 'proc', '-o', 'hidepid=1', 'none', '/proc')
    run_as(NOBODY, NOBODY, check_hidden_processes_as_user, address)


def check_hidden_processes_as_user(address):
    with pytest.raises(PermissionError):
        os.stat('/proc/1/stat')
    supervisor = SupervisorProcess({'echo': partial(Process, address)})
    supervisor.start()
    with ZMQClient(address, timeout=TIMEOUT) as client:
        assert client.call('echo', 1) == 1
    supervisor.stop()
    assert supervisor.exitcode == 0


def test_hidden_processes(tmp_path, address):
    """With the mount option hidepid of /proc, those of other users are left alone."""
    tmp_path.chmod(0o777)
    run_unshared(check_hidden_processes, address)


def test_process_that_cannot_be_read(monkeypatch):
    """It is not ours, or a child that has become another user."""

    def fail(*args, **kwargs):
        raise PermissionError

    with subprocess.Popen(['sleep', '60']) as program:
        monkeypatch.setattr(descendants_module, 'open', fail, raising=False)
        assert ProcessInfo.read(1) is None
        assert ProcessInfo.read(program.pid).pid == program.pid
        program.kill()
    assert ProcessInfo.read(program.pid) is None


def test_warning_once(monkeypatch, caplog):
    """Forks inherit that it was logged."""
    monkeypatch.setattr(descendants_module, 'has_proc', lambda: False)
    monkeypatch.setattr(descendants_module, '_has_warned', False)
    for _number in range(2):
        descendants_module.warn_without_proc('echo')
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith('echo: /proc is not mounted')
