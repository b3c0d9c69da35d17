# SPDX-License-Identifier: ZPL-2.1
"""Kills programs that use an outbox, and compares what they have committed with what arrived."""

import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from checks import TIMEOUT, wait_until
from outbox_databases import open_database, remove_lock
from outbox_program import DRAIN
from outbox_services import JobRecorder, Recorder
from postgresql import run_postgresql
from pyams_zmq.client import ZMQClient
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import running
from zodb_databases import run_zeo

PROGRAM = Path(__file__).parent / 'outbox_program.py'

MAX_LIFE = 0.5
"""Seconds from the first commit of a program until it is killed, at most"""

DRAIN_TIMEOUT = 100
"""Seconds until all messages have arrived at the end"""

MAX_COUNTS = {'after the drop': 3}
"""How often a program passes a point, at most; others are passed with each commit"""


class Outcome(NamedTuple):
    """What became of the messages of programs that were killed, by service.

    :ivar committed: number of committed transactions
    :ivar lost: names that were committed and did not arrive
    :ivar phantom: names that arrived and were not committed
    :ivar twice: number of names that arrived more than once
    :ivar disordered: processes whose first deliveries are not in their order
    """

    committed: int
    lost: dict
    phantom: dict
    twice: dict
    disordered: dict


@contextmanager
def make_database(kind, folder):
    """Make a database; yield its URL for `open_database`.

    :param kind: `'sqlite'`, `'postgresql'` or `'zeo'`
    """
    with ExitStack() as stack:
        url = f'sqlite:///{folder}/data.sqlite'
        if kind == 'zeo':
            url = f'zeo:{stack.enter_context(run_zeo(folder / "data.fs"))}'
        elif kind == 'postgresql':
            url = stack.enter_context(run_postgresql()).make_database()
        yield url
        remove_lock(url)


class Services:
    """The services for messages and jobs, which run until the end of the block.

    :param folder: folder for their files
    """

    def __init__(self, folder):
        self._folder = folder
        self.recorders = {
            'messages': Recorder(folder / 'messages'),
            'jobs': JobRecorder(folder / 'jobs'),
        }
        self.addresses = {name: f'ipc://{folder}/{name}.sock' for name in self.recorders}
        self._stack = ExitStack()

    def start(self):
        """Start the services."""
        process = ZMQProcess(self.addresses['messages'], self.recorders['messages'])
        pool = ZMQPool(self.addresses['jobs'], self.recorders['jobs'], workers=1)
        pool.journal = str(self._folder / 'journal')
        for each in (process, pool):
            self._stack.enter_context(running(each))

    def wait_for_jobs(self):
        """Wait until all jobs that were accepted have ended."""
        with ZMQClient(self.addresses['jobs']) as client:
            for state in ('waiting', 'running'):
                wait_until(lambda state=state: not client.jobs(state=state, limit=1), DRAIN_TIMEOUT)

    def stop(self):
        """Stop the services; they can be started again."""
        self._stack.close()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()


class Killed:
    """Programs that commit, one after the other, until they are killed.

    :param url: URL of their database
    :param folder: folder for their log
    :param services: the services
    :param seed: seed of the random times
    """

    def __init__(self, url, folder, services, seed=0):
        self._url = url
        self._log = folder / 'log'
        self._services = services
        self._random = random.Random(seed)
        self._number = 0

    def start(self, point='', count=0):
        """Start a program, and wait until it has committed, or has ended.

        :param point, count: where it kills itself
        """
        addresses = self._services.addresses.values()
        self._number += 1
        path = os.pathsep.join(filter(None, (str(PROGRAM.parent), os.environ.get('PYTHONPATH'))))
        command = [sys.executable, '-W', 'ignore', PROGRAM, self._url]
        with self._log.open('ab') as log:
            program = subprocess.Popen(
                [*command, *addresses, f'web{self._number}', point, str(count)],
                env={**os.environ, 'PYTHONPATH': path},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        program.stdout.readline()
        return program

    def kill_at_random(self):
        """Run a program, and kill it at a random time."""
        with self.start() as program:
            try:
                program.wait(self._random.random() * MAX_LIFE)
            except subprocess.TimeoutExpired:
                program.kill()
        self._check(program)

    def kill_at(self, point):
        """Run a program that kills itself at a point."""
        with self.start(point, self._random.randint(1, MAX_COUNTS.get(point, 20))) as program:
            try:
                program.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                program.kill()
                raise
        self._check(program)

    def run_without_services(self, seconds):
        """Run two programs while the services are down, and a second longer; kill them then.

        :param seconds: time for which the services are down
        """
        with self.start() as one, self.start() as other:
            self._services.stop()
            try:
                self._go_on([one, other], seconds)
                self._services.start()
                self._go_on([one, other], 1)
            finally:
                one.kill()
                other.kill()

    def _go_on(self, programs, seconds):
        """Let programs run for some time; none may end: a commit would have failed."""
        with suppress(subprocess.TimeoutExpired):
            programs[0].wait(seconds)
        assert all(program.poll() is None for program in programs), self._log.read_text()

    def _check(self, program):
        assert program.returncode == -signal.SIGKILL, self._log.read_text()

    def drain(self):
        """Run a last program until all entries have left the outbox; return what became of them."""
        with self.start(DRAIN) as program:
            assert program.wait(DRAIN_TIMEOUT) == 0, self._log.read_text()
        self._services.wait_for_jobs()
        with open_database(self._url, '') as database:
            names = database.names()
        return compare(names, self._services.recorders)


def compare(names, recorders):
    """Return what became of messages.

    :param names: names that were committed
    :param recorders: the recorders of the services, by their name
    """
    arrived = {service: each.names() for service, each in recorders.items()}
    return Outcome(
        len(names),
        {service: names - set(found) for service, found in arrived.items()},
        {service: set(found) - names for service, found in arrived.items()},
        {
            service: sum(number > 1 for number in Counter(found).values())
            for service, found in arrived.items()
        },
        {service: find_disorder(found) for service, found in arrived.items()},
    )


def find_disorder(names):
    """Return the processes whose names do not come in their order, at their first time."""
    numbers = defaultdict(list)
    for name in dict.fromkeys(names):
        process, _, number = name.partition('.')
        numbers[process].append(int(number))
    return [process for process, found in numbers.items() if found != sorted(found)]
