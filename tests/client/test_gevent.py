# SPDX-License-Identifier: ZPL-2.1
"""With the patches of gevent, other greenlets run while one waits for a reply."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from handlers import Process
from pyams_zmq.handler import ZMQMessageHandler

pytest.importorskip('gevent')

PATCH = 'from gevent import monkey; monkey.patch_all()\n'
IMPORT = 'from pyams_zmq.socket import zmq_response, zmq_socket\n'
TOOLS = """
import gc, json, select, sys, time, warnings
import gevent

addresses = sys.argv[1:]
ticks = 0

def tick():  # a clock, which stops when the hub is blocked
    global ticks
    while True:
        gevent.sleep(0.01)
        ticks += 1

def ask(address, message, timeout=10, auth=None):
    socket = zmq_socket(address, auth=auth)
    socket.send_json(message)
    return zmq_response(socket, timeout=timeout)

def timed(function, *args, **kwargs):
    start = time.monotonic()
    return function(*args, **kwargs), time.monotonic() - start

ticker = gevent.spawn(tick)

def report(**kwargs):
    ticker.kill()
    gc.collect()
    print(json.dumps(kwargs))
"""


class Fetcher:
    """The service of the page on event loops."""

    async def fetch(self, url):
        return [200, url]


class EchoHandler(ZMQMessageHandler):
    """Serves Fetcher."""

    handler = Fetcher


class KilledProcess(Process):
    """Has a short drain time-out."""

    drain_timeout = 0.1


def run(program, *processes, patch=PATCH + IMPORT):
    """Run a program under gevent; return its report."""
    result = subprocess.run(
        [
            sys.executable,
            '-W',
            'error::ResourceWarning',
            '-W',
            'ignore:pkg_resources is deprecated',  # Pyramid 2 imports it
            '-c',
            patch + TOOLS + textwrap.dedent(program),
            *[getattr(process, 'bound_address', process) for process in processes],
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, '')
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    'patch', [PATCH + IMPORT, IMPORT + PATCH], ids=['first', 'after the import']
)
def test_others_run_meanwhile(start, patch):
    result = run(
        """
        reply, seconds = timed(ask, addresses[0], ['sleep', 0.5])
        report(reply=reply, seconds=seconds, ticks=ticks)
        """,
        start(),
        patch=patch,
    )
    assert result['reply'] == [200, 0.5]
    assert result['seconds'] >= 0.49
    assert result['ticks'] > 10


def test_services_in_parallel(start):
    services = [start() for _ in range(4)]
    result = run(
        """
        def ask_all():
            jobs = [gevent.spawn(ask, address, ['sleep', 1]) for address in addresses]
            gevent.joinall(jobs, raise_error=True)
            return [job.value for job in jobs]

        replies, seconds = timed(ask_all)
        many = [gevent.spawn(ask, addresses[0], ['echo', number]) for number in range(100)]
        gevent.joinall(many, raise_error=True)
        report(replies=replies, seconds=seconds, many=[job.value for job in many])
        """,
        *services,
    )
    assert result['replies'] == [[200, 1]] * 4
    assert 0.99 <= result['seconds'] < 3
    # They share the context of the process, and one service.
    assert result['many'] == [[200, number] for number in range(100)]


def test_refused(start):
    result = run(
        """
        replies = {}
        for name, address, auth in (
            ('good', addresses[0], 'user:password'),
            ('bad', addresses[0], 'user:x'),
            ('none', addresses[0], None),
            ('needless', addresses[1], 'user:password'),
            ('denied', addresses[2], None),
        ):
            replies[name] = timed(ask, address, ['echo', 1], auth=auth)
        report(**replies)
        """,
        start(auth='user:password'),
        start(),
        start(clients='10.0.0.1'),
    )
    assert {name: reply[0] for name, (reply, _seconds) in result.items()} == {
        'good': 200,
        'bad': 401,
        'none': 401,
        'needless': 401,
        'denied': 401,
    }
    assert max(seconds for _reply, seconds in result.values()) < 5


def test_timeouts(start, tmp_path):
    """Those of this package, and those of gevent."""
    result = run(
        """
        reply, seconds = timed(ask, addresses[0], ['echo', 1], timeout=1)
        counted = ticks
        start = time.monotonic()
        try:
            with gevent.Timeout(0.2):
                ask(addresses[1], ['sleep', 30])
        except gevent.Timeout:
            later = time.monotonic() - start
            report(reply=reply, seconds=seconds, ticks=counted, later=later)
        """,
        f'ipc://{tmp_path}/nobody',
        start(factory=KilledProcess),
    )
    assert result['reply'] == [503, 'Connection timeout']
    assert 1 <= result['seconds'] < 5
    assert result['ticks'] > 5
    assert 0.2 <= result['later'] < 5


def test_late_server(start, tmp_path):
    """The server starts after the program has reported that it waits."""
    address = f'ipc://{tmp_path}/socket'
    program = """
    job = gevent.spawn(ask, addresses[0], ['echo', 1])
    gevent.sleep(0)  # lets the job run
    print('waiting', flush=True)
    reply = job.get()
    report(reply=reply)
    """
    with subprocess.Popen(
        [sys.executable, '-c', PATCH + IMPORT + TOOLS + textwrap.dedent(program), address],
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        try:
            assert client.stdout.readline() == 'waiting\n'
            start(address)
            assert json.loads(client.stdout.readline()) == {'reply': [200, 1]}
        finally:
            client.kill()


def test_killed_greenlet(start):
    """It leaves nothing running, and does not disturb the others."""
    result = run(
        """
        import os, threading
        ask(addresses[0], ['echo', 1])
        fds = len(os.listdir('/proc/self/fd'))
        jobs = [gevent.spawn(ask, addresses[1], ['sleep', 30]) for _ in range(20)]
        other = gevent.spawn(ask, addresses[0], ['sleep', 0.3])
        gevent.sleep(0)  # lets the jobs run
        gevent.killall(jobs)
        del jobs
        reply = other.get()
        del other
        deadline = time.monotonic() + 5
        while len(os.listdir('/proc/self/fd')) > fds and time.monotonic() < deadline:
            gc.collect()
            gevent.sleep(0.01)  # a poll with a deadline
        report(reply=reply, fds=len(os.listdir('/proc/self/fd')) - fds)
        """,
        start(),
        start(factory=KilledProcess),
    )
    assert result['reply'] == [200, 0.3]
    assert result['fds'] <= 0


def test_client(start, tmp_path):
    """Calls of many greenlets share a client, and messages are sent in the background."""
    result = run(
        """
        import os
        from pyams_zmq.client import ZMQClient

        path = addresses[2]

        def call_late():
            try:
                return slow.call('sleep', 30)
            except Exception as error:
                return type(error).__name__

        with ZMQClient(addresses[0]) as client, ZMQClient(addresses[1], timeout=1) as slow:
            jobs = [gevent.spawn(client.call, 'echo', number) for number in range(50)]
            late = gevent.spawn(call_late)
            client.send('touch', path)
            gevent.joinall([*jobs, late])
            deadline = time.monotonic() + 5
            while not os.path.exists(path) and time.monotonic() < deadline:
                gevent.sleep(0.01)  # a poll with a deadline
            report(
                calls=[job.value for job in jobs],
                late=late.value,
                sent=os.path.exists(path),
                ticks=ticks,
            )
        """,
        start(),
        start(factory=KilledProcess),
        str(tmp_path / 'sent'),
    )
    assert result['calls'] == list(range(50))
    assert result['late'] == 'ZMQTimeoutError'
    assert result['sent']
    assert result['ticks'] > 10


def test_documentation(start):
    text = (Path(__file__).parents[2] / 'docs' / 'howto' / 'loops.rst').read_text('utf-8')
    [block] = re.findall(
        r'\.\. skip: next\n\n\.\. code-block:: python\n(.*?)\n(?=\S)', text, re.DOTALL
    )
    program = ('-W', 'ignore:pkg_resources is deprecated', '-c', textwrap.dedent(block))
    result = subprocess.run(
        [sys.executable, *program, start(handler=EchoHandler).bound_address],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (result.stdout, result.stderr) == ('[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n', '')


def test_without_patching(start):
    """An import of gevent without patches changes nothing."""
    result = run(
        """
        from types import BuiltinFunctionType
        reply, seconds = timed(ask, addresses[0], ['sleep', 0.2])
        report(reply=reply, ticks=ticks, builtin=isinstance(select.poll, BuiltinFunctionType))
        """,
        start(),
        patch=IMPORT,
    )
    assert result == {'reply': [200, 0.2], 'ticks': 0, 'builtin': True}


def test_process_is_not_started():
    """Its threads would be greenlets, which do not run while a loop polls."""
    result = run(
        """
        from pyams_zmq.exceptions import ZMQStartError
        from pyams_zmq.process import ZMQProcess

        try:
            ZMQProcess('127.0.0.1', print).start()
        except ZMQStartError as error:
            report(error=str(error))
        """
    )
    assert 'gevent' in result['error']


def test_device_is_not_started():
    """Its loop would block all greenlets."""
    result = run(
        """
        from pyams_zmq.device import ProcessDevice, ThreadDevice
        from pyams_zmq.exceptions import ZMQStartError

        errors = []
        for factory in (ThreadDevice, ProcessDevice):
            try:
                factory().start()
            except ZMQStartError as error:
                errors.append(str(error))
        report(errors=errors)
        """
    )
    assert len(result['errors']) == 2
    assert all('gevent' in error for error in result['errors'])
