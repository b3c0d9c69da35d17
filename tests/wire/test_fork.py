# SPDX-License-Identifier: ZPL-2.1
"""State that a fork must not share with its parent."""

import os
import threading
from multiprocessing.context import ForkProcess

import pytest

from pyams_zmq.wire.fork import ForkLocal

PARENT = """
import atexit, ctypes, json, logging, os, sys, time
from handlers import MessageHandler, Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import ThreadDevice, spin_watch

spin_watch.INTERVAL = 3600  # it does not run at the fork, see below
logging.basicConfig()
process = Process()
process.start()
client = ZMQClient(process.wait_ready(), timeout=10)
client.send('echo', 1)
device = ThreadDevice()
device.bind_in('127.0.0.1')
device.bind_out('127.0.0.1')
device.start()

def turns_of_others():
    found = []
    for thread in set(os.listdir('/proc/self/task')) - {str(os.getpid())}:
        with open(f'/proc/self/task/{thread}/status') as file:
            found.append([line for line in file if line.startswith(('Pid', 'State'))
                          or 'ctxt_switches' in line])
    return sorted(map(''.join, found))

def check(who):
    client.send('echo', 2)
    assert client.call('pid') == process.pid
    assert (who == 'parent') != device.done
    print(json.dumps(who), flush=True)
"""

IN_C = """
fork = ctypes.PyDLL(None).fork if sys.argv[1] == 'c' else os.fork
device.statistics()
# In a fork without the hooks of Python, the lock of the interpreter is broken if a thread waited
# for it: wait until all others sleep, and have not run between two looks.
deadline, former = time.monotonic() + 20, None
while (turns := turns_of_others()) != former or not all('S (sleeping)' in each for each in turns):
    assert time.monotonic() < deadline, turns
    former = turns
    time.sleep(0.05)  # a poll; a thread that waits for the lock runs each 5 ms
fork = fork()
if not fork:
    check('fork')
    if sys.argv[2] == 'exit':
        device.stop()
        process.stop()
        atexit._run_exitfuncs()
    os._exit(0)
_pid, status = os.waitpid(fork, 0)
assert status == 0
check('parent')
device.statistics()
device.stop()
"""


def test_one_value_for_each_process():
    local = ForkLocal(object)
    value = local.get()
    assert local.get() is value

    def run():
        own = local.get()
        assert own is not value
        assert local.get() is own
        assert local._inherited == [value]  # kept, not deleted

    child = ForkProcess(target=run)
    child.start()
    child.join(10)
    assert child.exitcode == 0
    assert local.get() is value


def test_threads_get_the_same_value():
    def make():
        barrier.wait(5)  # all threads make one
        return object()

    def run():
        values.append(local.get())

    barrier = threading.Barrier(8)
    values = []
    local = ForkLocal(make)
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(values) == 8
    assert len(set(map(id, values))) == 1


def test_fork_without_hooks(monkeypatch):
    """After a fork by uWSGI only the process id is different."""
    local = ForkLocal(list)
    parents = local.get()
    pid = os.getpid()
    monkeypatch.setattr(os, 'getpid', lambda: -pid)
    assert local.get() is not parents
    assert local._inherited == [parents]


@pytest.mark.parametrize('how', ['c', 'python'])
@pytest.mark.parametrize('end', ['exit', 'end'])
def test_fork_of_a_program(run_program, how, end):
    """It has its own client, and leaves the process and the device of its parent alone.

    uWSGI forks without the hooks of Python, and runs the functions of `atexit` in its workers.
    """
    program = run_program('-W', 'ignore', '-c', PARENT + IN_C, how, end)
    assert [program.read(), program.read()] == ['fork', 'parent']
    assert program.wait(30) == 0
    assert not program.log.read_text()
