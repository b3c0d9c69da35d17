# SPDX-License-Identifier: ZPL-2.1
"""The faults of a soak: their plan, and what they do."""

import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from pyams_zmq.wire.poll import wait_readable
from soak.checks import Interruption
from soak.peers import HostilePeers, split
from soak.programs import Program, restart_ended

ROUTES = ('single', 'steady', 'concurrent', 'pool', 'device')

POOL = ('pool broker', 'pool worker 1', 'pool worker 2')

KINDS = {
    # Peers that mean harm
    'flood and reset': ROUTES,
    'garbage': ROUTES,
    'half a frame': ROUTES,
    'huge header': ROUTES,
    'many connections': ROUTES,
    'endless message': ROUTES,
    'slow reader': ROUTES,
    # Load
    'full queue': ('single', 'concurrent', 'pool', 'device'),
    'hang': ('single', 'concurrent', 'pool'),
    # Clients
    'kill client': ROUTES,
    'stop client': ('load',),
    # Services
    'kill': ('single', 'concurrent', *POOL, 'device'),
    'stop shortly': ('single', 'steady', 'concurrent', *POOL, 'device'),
    'stop until killed': ('single', 'concurrent', *POOL),
    'reload': ('single', 'steady', 'concurrent', 'pool'),
    'restart': ('single', 'concurrent', 'pool'),
    # The network
    'reset': ('relay',),
    'slow link': ('relay',),
}
"""Kinds of faults, with their targets"""

LOSING = {'kill', 'stop until killed', 'reset'}
"""Kinds after which messages under way may be lost"""

HARMLESS = {
    *('garbage', 'half a frame', 'huge header', 'many connections', 'endless message'),
    *('slow reader', 'reload'),
}
"""Kinds that must not make any call fail"""

BUSY = {'flood and reset': 5.0, 'full queue': 5.0, 'hang': 5.0, 'kill client': 5.0}
"""Seconds in which a service is busy after a fault, by its kind"""

PAUSES = (0.3, 4.0)
"""Least and most seconds between two faults"""

SHORT_STOP = (0.2, 0.7)
"""Seconds of a stop (SIGSTOP) after which the supervisor does not kill a service (1.5 s)"""

CLIENT_STOP = (0.5, 3.0)
"""Seconds that the client program is stopped"""

HANG_TIMEOUT = 10.0
"""Seconds until the supervisor has killed a service that is stopped"""

STARTED = 20.0
"""Seconds until a program has bound its address"""

SENT = 5.0
"""Seconds until a client that floods a service is killed, if it has not sent everything before"""


class Fault(NamedTuple):
    """A fault, and the seconds after the last one."""

    pause: float
    kind: str
    target: str


def plan(seed):
    """Return the faults of a seed, without end: every kind once, in a new order each time."""
    rng = random.Random(seed)  # noqa: S311 - repeatable
    while True:
        for kind in rng.sample(list(KINDS), len(KINDS)):
            yield Fault(rng.uniform(*PAUSES), kind, rng.choice(KINDS[kind]))


class Faults:
    """Causes the faults of a plan.

    :param folder: folder of the logs
    :param services: programs of the services, by name
    :param addresses: addresses of the services, by name
    :param load: program of the clients
    :param relay: the relay before a service

    :ivar interruptions: when which target was disturbed
    :ivar done: number of faults by kind
    :ivar problems: what went wrong
    """

    def __init__(self, folder, services, addresses, load, relay):
        self.interruptions = []
        self.done = Counter()
        self.problems = []
        self._folder = folder
        self._services = services
        self._addresses = addresses
        self._load = load
        self._relay = relay
        self._peers = HostilePeers()
        self._killed = 0

    def run(self, seed, seconds):
        """Cause the faults of a seed for some seconds."""
        self._rng = random.Random(seed)  # noqa: S311 - repeatable
        end = time.monotonic() + seconds
        for fault in plan(seed):
            time.sleep(max(0, min(fault.pause, end - time.monotonic())))
            if time.monotonic() >= end:
                break
            self._peers.release()
            self.problems += restart_ended([*self._services.values(), self._load])
            self._cause(fault)
        self._peers.release(0)

    def _cause(self, fault):
        self.done[fault.kind] += 1
        print(f'{time.time():.1f} {fault.kind}: {fault.target}', file=sys.stderr)
        actions = {
            'kill client': self._kill_client,
            'stop client': self._stop_client,
            'kill': self._kill,
            'stop shortly': self._stop_shortly,
            'stop until killed': self._stop_until_killed,
            'reload': self._reload,
            'restart': self._restart,
            'reset': lambda _target: self._relay.reset(),
            'slow link': self._slow_down,
        }
        begin = time.time()
        with suppress(OSError):  # the target may be down after another fault
            if fault.kind in actions:
                actions[fault.kind](fault.target)
            else:
                self._peers.attack(fault.kind, self._addresses[fault.target])
        if fault.kind not in HARMLESS:
            end = time.time() + BUSY.get(fault.kind, 0)
            loses = fault.kind in LOSING
            self.interruptions.append(Interruption(fault.target, begin, end, loses))
            if fault.kind in BUSY and fault.target == 'device':  # the load passes it
                self.interruptions.append(Interruption('concurrent', begin, end, loses))

    def _pid_of(self, target):
        return self._services['pool' if target in POOL else target].pid_of(target)

    def _kill_client(self, target):
        self._killed += 1
        name = f'killed{self._killed}'
        client = Program(
            *('killed', self._folder, 'soak.load', 'flood', name, self._addresses[target], '1500')
        )
        client.start()
        wait_readable([client.process.stdout.fileno()], SENT)
        client.kill()

    def _stop_client(self, _target):
        self._load.process.send_signal(signal.SIGSTOP)
        time.sleep(self._rng.uniform(*CLIENT_STOP))
        self._load.process.send_signal(signal.SIGCONT)

    def _kill(self, target):
        os.kill(self._pid_of(target), signal.SIGKILL)
        if target == 'device':  # which has no supervisor
            self._services[target].wait(STARTED)
            self._start(target)

    def _stop_shortly(self, target):
        pid = self._pid_of(target)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(self._rng.uniform(*SHORT_STOP))
        os.kill(pid, signal.SIGCONT)

    def _stop_until_killed(self, target):
        pid = self._pid_of(target)
        os.kill(pid, signal.SIGSTOP)
        end = time.monotonic() + HANG_TIMEOUT
        while os.path.exists(f'/proc/{pid}'):
            if time.monotonic() > end:
                self.problems.append(f'{target} hangs and is not killed')
                os.kill(pid, signal.SIGCONT)
                break
            time.sleep(0.05)

    def _reload(self, target):
        self._services[target].process.send_signal(signal.SIGHUP)

    def _restart(self, target):
        code = self._services[target].stop()
        if code != 0:
            self.problems.append(f'{target} ended with exit code {code} after SIGTERM')
            self._services[target].kill()
        self._start(target)

    def _start(self, target):
        self._services[target].start()
        host, port = split(self._addresses[target])
        end = time.monotonic() + STARTED
        while time.monotonic() < end:
            with suppress(ConnectionRefusedError):
                socket.create_connection((host, port)).close()
                break
            time.sleep(0.05)

    def _slow_down(self, _target):
        self._relay.slow_down(True)
        time.sleep(3)
        self._relay.slow_down(False)
