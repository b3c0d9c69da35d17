# SPDX-License-Identifier: ZPL-2.1
"""The faults of a soak of jobs: what is killed or stopped, and when."""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from soak.job_programs import SERVICE
from soak.programs import list_tree

TARGETS = {
    'worker': 25,
    'broker': 25,
    'pool': 15,  # the process above broker and workers
    'program': 10,  # the process above the pool; the others have to notice that
    'all': 5,  # all processes of the program at once
    'client': 20,
}
"""What is killed, and how often of a hundred times"""

STOPPED = ('worker', 'broker', 'pool')
"""What is stopped (SIGSTOP) instead, in some of the times"""

PAUSES = (0.2, 1.0)
"""Least and most seconds between two faults"""

STOPS = (0.1, 5.0)
"""Least and most seconds until SIGCONT, if the supervisor has not killed the process before"""


class Fault(NamedTuple):
    """A fault.

    :ivar pause: seconds after the last one
    :ivar choice: a number below 1, which chooses one of several workers
    :ivar stop: seconds that the process is stopped; 0 to kill it
    """

    pause: float
    target: str
    choice: float
    stop: float


def plan(seed, number, has_stops=False):
    """Return the faults of a seed.

    :param has_stops: true if some of them are stops
    """
    rng = random.Random(seed)  # noqa: S311 - repeatable
    for _ in range(number):
        [target] = rng.choices(list(TARGETS), list(TARGETS.values()))
        pause, choice, is_stop, stop = (
            *(rng.uniform(*PAUSES), rng.random()),
            *(rng.random() < 0.5, rng.uniform(*STOPS)),  # noqa: PLR2004 - half of them
        )
        is_stop = has_stops and is_stop and target in STOPPED
        yield Fault(pause, target, choice, stop if is_stop else 0.0)


class JobFaults:
    """Causes faults.

    :param service: program of the service
    :param client: program of the client
    :param elsewhere: programs with workers on other machines

    :ivar done: number of faults by kind
    """

    def __init__(self, service, client, elsewhere=()):
        self.done = Counter()
        self._service = service
        self._client = client
        self._elsewhere = elsewhere
        self._programs = [service, *elsewhere, client]
        self._stopped = []

    def run(self, faults):
        """Cause some faults; all programs run at the end."""
        for fault in faults:
            end = time.monotonic() + fault.pause
            while time.monotonic() < end:
                self._continue(time.monotonic())
                self.restart()
                time.sleep(0.02)
            while not self._cause(fault):  # the target may just start
                time.sleep(0.05)
                self.restart()
            self.done[f'{"stop" if fault.stop else "kill"} {fault.target}'] += 1
        while self._stopped:
            self._continue(time.monotonic())
            time.sleep(0.05)
        self.restart()

    def restart(self):
        """Start the programs that have ended again."""
        for program in self._programs:
            code = program.process.poll()
            if code is not None and not (program is self._client and code == 0):
                program.wait(0)
                program.start()

    def _cause(self, fault):
        """Do it; return False if the process is not there."""
        try:
            pid = self._find(fault)
            if fault.target == 'all':
                self._service.kill()
            elif fault.stop:
                os.kill(pid, signal.SIGSTOP)
                self._stopped.append((time.monotonic() + fault.stop, pid))
            else:
                os.kill(pid, signal.SIGKILL)
                for program in self._programs:
                    if program.process.pid == pid:
                        program.wait(10)
        except ProcessLookupError:
            return False
        return True

    def _find(self, fault):
        """Return the pid of a process, or the negative one of the group of a program.

        :raises ProcessLookupError: it is not there
        """
        if fault.target == 'client':
            return self._client.process.pid
        if fault.target in ('program', 'all'):
            return self._service.process.pid
        tree = list_tree(self._service.process.pid)
        names = self._service.names()
        local = [pid for pid in tree if names.get(pid, '').startswith(f'{SERVICE} worker')]
        if fault.stop:  # all processes of another machine
            elsewhere = [-each.process.pid for each in self._elsewhere]
        else:
            elsewhere = [pid for each in self._elsewhere for pid in list_tree(each.process.pid)]
        found = {
            'worker': local + elsewhere,
            'broker': [pid for pid in tree if names.get(pid) == f'{SERVICE} broker'],
            'pool': [pid for pid in tree if names.get(pid) == SERVICE],
        }[fault.target]
        if not found:
            raise ProcessLookupError(fault.target)
        return found[int(fault.choice * len(found))]

    def _continue(self, now):
        for entry in list(self._stopped):
            due, pid = entry
            if due <= now:
                self._stopped.remove(entry)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
