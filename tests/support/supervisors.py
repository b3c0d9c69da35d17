# SPDX-License-Identifier: ZPL-2.1
"""Processes under a supervisor: fakes, and programs with real ones."""

from functools import partial

from checks import TIMEOUT
from pyams_zmq.supervisor import Supervisor

PROCESS = """
import json, logging, os, sys
from functools import partial
from pyramid.registry import Registry
from app.handler import Process
from handlers import ExitingSetup
from pyams_zmq.interfaces import IZMQProcessStartedEvent, IZMQProcessGivenUpEvent
from pyams_zmq.supervisor import Supervisor, SupervisorProcess

logging.basicConfig(level='INFO')
folder = sys.argv[1]
Supervisor.min_delay = 0.01

class Reloading(Process):
    def reload(self):
        super().reload()
        if self._watchdog is not None:
            say('reloaded', self.bound_address, os.getpid())

def say(*words):
    os.write(1, (json.dumps(words) + '\\n').encode())

def factory(name, factory=Reloading):
    return partial(factory, f'ipc://{folder}/{name}', registry=registry)

registry = Registry()
registry.registerHandler(
    lambda event: say('started', event.object.bound_address, os.getpid()),
    [IZMQProcessStartedEvent],
)
registry.registerHandler(
    lambda event: say('given up', event.name, event.exit_code), [IZMQProcessGivenUpEvent]
)
"""

RUN = (
    PROCESS
    + """
names = sys.argv[2:]
sys.exit(Supervisor({
    name: factory(name, ExitingSetup if name == 'broken' else Reloading) for name in names
}).run())
"""
)

FAILS_EARLY = """
from pyams_zmq.supervisor import Supervisor
Supervisor.max_starts = 2
Supervisor.give_up_delay = 0.2
"""

BESIDE = (
    PROCESS
    + """
supervisor = SupervisorProcess(
    {'echo': factory('echo')}, registry=registry, lock=sys.argv[2] or None
)
supervisor.start()
say('supervisor', supervisor.pid)
for line in sys.stdin:
    supervisor.stop()
    supervisor.stop()
    say('stopped', supervisor.exitcode)
"""
)

# The master of a preforking server: its workers keep the pipe to the supervisor open.
BESIDE_FORKS = BESIDE.replace(
    'for line in',
    """
if not os.fork():
    import signal
    signal.pause()
for line in""",
)


def read(program, expected):
    """Read the next line of a program, and check its first word."""
    word, *rest = program.read(TIMEOUT)
    assert word == expected, (word, rest)
    return rest


class Fake:
    """A process that runs until the test ends it; records the orders that it gets."""

    drain_timeout = 3

    def __init__(self, registry=None):
        self.registry = registry
        self.pid = 1
        self.exitcode = None
        self.ended = False
        self.ready = False
        self.error = None
        self.orders = []

    def start(self):
        self.orders.append('start')

    def end(self, exit_code):
        self.ended, self.exitcode = True, exit_code

    def reload(self):
        self.orders.append('reload')

    def _was_ready(self):
        return self.ready

    def _start_error(self):
        return self.error

    def _ask_to_stop(self):
        self.orders.append('ask')

    def stop(self):
        self.orders.append('stop')
        self.end(0)

    def _stop_orders(self):
        yield self._ask_to_stop, self.drain_timeout + 2
        yield partial(self.orders.append, 'terminate'), 1
        yield partial(self.orders.append, 'kill'), 5


class Fakes:
    """Makes fake processes, and a supervisor of one of them; has the clock."""

    def __init__(self, registry=None):
        self.made = []
        self.registry = registry
        self.supervisor = Supervisor({'fake': self.make})
        self.now = 1000.0

    def make(self):
        self.made.append(Fake(self.registry))
        return self.made[-1]

    def step(self, seconds=0.0):
        self.now += seconds
        return self.supervisor.step(self.now)

    def crash(self, life=0.0, exit_code=1):
        """Let the process crash after some seconds; return the delay of the next start."""
        self.made[-1].end(exit_code)
        return self.step(life)
