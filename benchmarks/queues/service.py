# SPDX-License-Identifier: ZPL-2.1
"""A queue that runs: its redis, its workers and its clients; and how they are killed."""

import json
import os
import random
import select
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from socket import AF_UNIX, socket
from time import monotonic, sleep

from queues import OURS
from queues.work import BEGUN, ENDED, WIDTH, read

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 60
END_TIMEOUT = 15


class FailedError(Exception):
    """A contender does not work."""


class Service:
    """A contender in a folder of its own.

    :param contender: see :class:`queues.Contender`
    :param python: interpreter of its environment
    :param folder: an empty folder
    :param seconds: duration of a job
    """

    def __init__(self, contender, python, folder, seconds=0.0):
        self.contender = contender
        self.folder = Path(folder)
        self._python = python
        self._env = {
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'PYTHONWARNINGS': 'ignore',
            'QUEUE_FOLDER': str(folder),
            'QUEUE_SECONDS': str(seconds),
        }
        self._log = (self.folder / 'log').open('ab')
        self._redis = self._workers = self._clients = None

    def __enter__(self):
        try:
            self.start_redis()
            self.start_workers()
            self._clients = self._run(
                [self._python, '-m', 'queues.clients', self.contender.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._read_line(START_TIMEOUT)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exc):
        self.end()

    def _run(self, command, **options):
        options = {'stdin': subprocess.DEVNULL, 'stdout': self._log, **options}
        return subprocess.Popen(  # noqa: S603 - the programs of the environments
            command,
            env=self._env,
            cwd=self.folder,
            stderr=self._log,
            start_new_session=True,
            **options,
        )

    def start_redis(self):
        """Start the server, if the contender has one; wait until it has read its file."""
        if self.contender.redis is None:
            return
        self._redis = self._run(
            [self._python, ROOT / 'queues/redis_server.py', self.folder, self.contender.redis]
        )
        deadline = monotonic() + START_TIMEOUT
        while not self._is_redis_ready():
            if self._redis.poll() is not None or monotonic() > deadline:
                raise FailedError('its redis does not start')
            sleep(0.05)

    def _is_redis_ready(self):
        with socket(AF_UNIX) as sock, suppress(OSError):
            sock.connect(str(self.folder / 'redis.sock'))
            sock.sendall(b'PING\r\n')
            return sock.recv(100).startswith(b'+PONG')  # not while it reads its file
        return False

    def start_workers(self):
        """Start the workers."""
        command = self.contender.command.format(
            bin=Path(self._python).parent,
            python=self._python,
            module=f'queues.{self.contender.module}',
            folder=self.folder,
        )
        self._workers = self._run(command.split())

    def begin(self, clients, first, count, seconds):
        """Let clients submit the jobs with some numbers, for some seconds at most."""
        words = {'clients': clients, 'first': first, 'count': count, 'seconds': seconds}
        self._clients.stdin.write(json.dumps(words).encode() + b'\n')
        self._clients.stdin.flush()

    def finish(self, timeout):
        """Return what the clients did, see `queues.clients.run_turn`."""
        return self._read_line(timeout)

    def _read_line(self, timeout):
        if not select.select([self._clients.stdout], [], [], timeout)[0]:
            raise FailedError('its clients take too long')
        line = self._clients.stdout.readline()
        if not line:
            text = (self.folder / 'log').read_text(encoding='utf-8', errors='replace').strip()
            raise FailedError(text.splitlines()[-1][:200] if text else 'its clients do not start')
        return json.loads(line)

    @property
    def ended(self):
        """Number of jobs that have ended, each time that they did."""
        try:
            return (self.folder / ENDED).stat().st_size // WIDTH
        except FileNotFoundError:
            return 0

    def wait_ended(self, count, timeout):
        """Wait until so many jobs have ended; return the time of this."""
        deadline = monotonic() + timeout
        while self.ended < count and monotonic() < deadline:
            sleep(0.002)
        return monotonic()

    def kill_worker(self, rng, killed):
        """Kill a process that runs a job; return True if there was one.

        :param killed: numbers of the jobs whose processes were killed; each is killed once, because
            queues give up a job that kills its processes again and again
        """
        known = killed | set(read(self.folder / ENDED))
        busy = [
            (int(path.suffix[1:]), numbers[-1])
            for path in self.folder.glob(f'{BEGUN}.*')
            if (numbers := read(path)) and numbers[-1] not in known
        ]
        rng.shuffle(busy)
        for pid, number in busy:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(number)
                return True
        return False

    def kill_server(self):
        """Kill the server: redis, or the broker of a pool; return True if there is one."""
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait()
            self.start_redis()
            return True
        if self.contender.environment != OURS:
            return False
        from pyams_zmq.client import ZMQClient  # noqa: PLC0415 - not in all environments

        with ZMQClient(f'ipc://{self.folder}/ours') as client:
            os.kill(client.call('pyams_zmq.stats')['pid'], signal.SIGKILL)
        return True

    def revive(self):
        """Start the workers again if they have ended, as the system does for a service."""
        if self._workers.poll() is not None:
            self.start_workers()

    def end(self):
        """End all processes."""
        if self._clients is not None:
            self._clients.stdin.close()
            self._clients.stdout.close()
        for process in (self._clients, self._workers, self._redis):
            if process is not None:
                with suppress(ProcessLookupError):
                    process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_TIMEOUT)
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._log.close()


def measure_rates(service, clients, seconds, limit):
    """Submit jobs for some seconds; return accepted, and ended jobs per second.

    :param limit: seconds after which jobs that have not ended do not count
    """
    service.begin(clients, 0, 1000, 0.2)  # the first ones are for warming up
    warm = service.finish(START_TIMEOUT)['submitted']
    service.wait_ended(1, START_TIMEOUT)
    service.wait_ended(warm, limit)
    before = service.ended
    service.begin(clients, 1000, 1_000_000, seconds)
    done = service.finish(START_TIMEOUT)
    end = service.wait_ended(
        before + done['submitted'], max(0.0, done['start'] + limit - monotonic())
    )
    took = end - done['start']
    return {
        'accepted': done['accepted'] / done['took'],
        'ended': (service.ended - before) / took,
        'left': before + done['submitted'] - service.ended,
    }


def measure_losses(service, jobs, kills, patience, seed=1):
    """Kill processes while jobs run; return how many jobs were lost, and ran more than once.

    A fourth of the kills are for the server, if there is one.

    :param patience: seconds without an end after which the jobs that have not ended are lost
    """
    rng = random.Random(seed)  # noqa: S311 - the same kills each time
    service.begin(16, 0, jobs, 60)
    accepted = service.finish(START_TIMEOUT)['submitted']
    service.wait_ended(1, START_TIMEOUT)
    done = servers = 0
    killed = set()
    last, last_time = 0, monotonic()
    while True:
        ended = len(set(read(service.folder / ENDED)))
        if ended != last:
            last, last_time = ended, monotonic()
        if ended >= jobs or monotonic() > last_time + patience:
            break
        service.revive()
        if done < kills and ended >= jobs * done // (kills + 4):
            is_server = done % 4 == 3 and service.kill_server()  # noqa: PLR2004 - the fourth
            servers += is_server
            if is_server or service.kill_worker(rng, killed):
                done += 1
        sleep(rng.uniform(0.05, 0.2))
    numbers = read(service.folder / ENDED)
    begun = [n for path in service.folder.glob(f'{BEGUN}.*') for n in read(path)]
    return {
        'jobs': accepted,
        'kills': done,
        'servers': servers,
        'lost': accepted - len(set(numbers)),
        'twice': len(begun) - len(set(begun)),
    }
