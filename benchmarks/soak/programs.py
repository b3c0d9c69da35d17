# SPDX-License-Identifier: ZPL-2.1
"""The programs of a soak, and the memory and descriptors of their processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

from soak.services import JOURNAL

PAGE = os.sysconf('SC_PAGE_SIZE') // 1024

MALLOC = {'MALLOC_MMAP_THRESHOLD_': '131072', 'MALLOC_TRIM_THRESHOLD_': '131072'}
"""Environment in which glibc returns large blocks to the system, so that only leaks stay"""

ZOMBIE = 5
"""Seconds that an ended process may wait for its parent"""

_STARTED = re.compile(r' INFO (.+) is process (\d+)$', re.MULTILINE)


@contextmanager
def reserved_address():
    """Reserve a TCP address: only a program that asks for this port can listen on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(('127.0.0.1', 0))  # without `listen`, which would exclude all others
        yield f'tcp://127.0.0.1:{holder.getsockname()[1]}'


class Program:
    """A program that can be started again; its log and its journal continue.

    :param name: name of the program
    :param folder: where the log and the journal are
    :param arguments: module and arguments
    """

    process = None

    def __init__(self, name, folder, *arguments):
        self.name = name
        self.log = folder / f'{name}.log'
        self.journal = folder / f'{name}.run'
        self._arguments = arguments

    def start(self):
        """Start it, and return at once."""
        path = [str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own programs
                [sys.executable, '-W', 'ignore', '-m', *self._arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={
                    **os.environ,
                    'PYTHONPATH': os.pathsep.join(filter(None, path)),
                    JOURNAL: str(self.journal),
                    **MALLOC,
                },
                start_new_session=True,
            )

    def read_log(self):
        """Return the log so far."""
        return self.log.read_text(errors='replace')

    def pid_of(self, name):
        """Return the pid of one of its processes.

        :raises ProcessLookupError: it was not started yet
        """
        pids = {found: int(pid) for found, pid in _STARTED.findall(self.read_log())}
        if not pids:
            return self.process.pid
        if name not in pids:
            raise ProcessLookupError(name)
        return pids[name]

    def names(self):
        """Return the names of its processes by pid."""
        names = {int(pid): name for name, pid in _STARTED.findall(self.read_log())}
        return {self.process.pid: f'{self.name}, program'} | names

    def stop(self, timeout=30):
        """Stop it with SIGTERM; return its exit code, or `hangs`."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout)

    def wait(self, timeout):
        """Wait for its end; return its exit code, or `hangs`."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return 'hangs'
        self.process.stdin.close()
        self.process.stdout.close()
        return code

    def kill(self):
        """Kill all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait(10)


def restart_ended(programs):
    """Start the programs that have ended by themselves again; return the problems."""
    problems = []
    for program in programs:
        code = program.process.poll()
        if code is not None:
            problems.append(f'{program.name} ended with exit code {code}')
            program.wait(0)
            program.start()
    return problems


def list_tree(pid):
    """Return a process and its descendants: pids and states, by pid."""
    states, todo = {}, [pid]
    for each in todo:
        with suppress(OSError):
            fields = (
                Path(f'/proc/{each}/stat').read_text(encoding='utf-8').rpartition(')')[2].split()
            )
            states[each] = fields[0]
            for path in Path(f'/proc/{each}/task').glob('*/children'):
                todo += map(int, path.read_text(encoding='ascii').split())
    return states


def end_descendants(pid):
    """Kill the descendants that a process still has at the end; return the problems."""
    problems = []
    left_behind = {each for each, state in list_tree(pid).items() if state != 'Z'} - {pid}
    for left in left_behind:
        problems.append(f'process {left} was left behind')
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    return problems


class Sampler:
    """Reads the memory and the descriptors of all processes each second, in a thread.

    :ivar samples: values by process, `(program, pid)`, and unit
    :ivar zombies: processes that nobody has waited for
    """

    def __init__(self, programs):
        self.programs = programs
        self.names = {}
        self.samples = defaultdict(lambda: {'KiB': [], 'descriptors': []})
        self.zombies = set()
        self._seconds_dead = defaultdict(int)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self):
        """Start the thread."""
        self._thread.start()

    def stop(self):
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(1):
            self.step()

    def step(self):
        """Take a sample of each process."""
        for program in self.programs:
            for pid, state in list_tree(program.process.pid).items():
                self._sample(program, pid, state)

    def _sample(self, program, pid, state):
        key = (program.name, pid)
        if state == 'Z':
            self._seconds_dead[key] += 1
            if self._seconds_dead[key] == ZOMBIE:
                self.zombies.add(f'{program.name}: process {pid} has ended, its parent ignores it')
            return
        with suppress(OSError, IndexError):
            pages = int(Path(f'/proc/{pid}/statm').read_text(encoding='ascii').split()[1])
            descriptors = len(os.listdir(f'/proc/{pid}/fd'))
            self.samples[key]['KiB'].append(pages * PAGE)
            self.samples[key]['descriptors'].append(descriptors)
