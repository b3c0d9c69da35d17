# SPDX-License-Identifier: ZPL-2.1
"""Questions about a process: who it is, what it does, what it can do; who may ask."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from ipaddress import ip_address

import pytest
import zmq

from app.program import is_running
from checks import TIMEOUT, freeze, wait_until
from handlers import Handler, Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQRemoteError, ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.process import inspection as inspection_module
from pyams_zmq.process.attendant import Attendant
from pyams_zmq.process.inspection import Inspection
from pyams_zmq.process.waiting import MAX_WAITING
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.testing import running

PING = {'name', 'kind', 'version', 'pid', 'host', 'uptime', 'state', 'workers'}


class Busy(Handler):
    """Methods that end when a file appears."""

    def hold(self, path):
        """Wait for the file."""
        while not os.path.exists(path):
            time.sleep(0.001)  # it waits for another process

    def compute_for(self, path):
        """Compute while the file is missing.

        Only the first line is shown.
        """
        while not os.path.exists(path):
            pass


class Concurrent(Process):
    """Runs two methods at a time."""

    concurrency = 2


class Restricted(Process):
    """Shows its statistics to one user."""

    stats_users = ('alice',)


@pytest.fixture
def asker():
    """Return a client of a process."""
    clients = []

    def make(process, **options):
        clients.append(ZMQClient(process.bound_address, timeout=TIMEOUT, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def in_thread():
    """Call a function in a thread, which is joined at the end."""
    threads = []

    def call(function, *args):
        threads.append(threading.Thread(target=function, args=args))
        threads[-1].start()

    yield call
    for thread in threads:
        thread.join(TIMEOUT)


def test_ping_and_stats(start, asker):
    process = start()
    client = asker(process)
    ping = client.call('pyams_zmq.ping')
    assert ping.keys() == PING
    assert (ping['pid'], ping['kind'], ping['state']) == (process.pid, 'process', 'up')
    assert ping['workers'] == 1
    client.call('echo', 1)
    with pytest.raises(ZMQRemoteError):
        client.call('raises', 'ValueError')
    with pytest.raises(ZMQRemoteError):
        client.call('nothing_such')
    stats = client.call('pyams_zmq.stats')
    assert stats.keys() > PING
    assert (stats['calls'], stats['errors'], stats['refused']) == (2, 1, 1)
    assert (stats['in_flight'], stats['queue'], stats['oldest']) == (0, 0, 0)
    assert stats['methods'].keys() == {'echo', 'raises'}
    echo = stats['methods']['echo']
    assert (echo['calls'], echo['errors']) == (1, 0)
    assert echo['buckets'][-1][1] == 1
    assert 0 < echo['p50'] <= echo['max'] < TIMEOUT
    assert stats['addresses'] == [process.bound_address]
    assert stats['memory'] > 5
    [worker] = stats['workers']
    assert (worker['pid'], worker['state'], worker['calls']) == (process.pid, 'idle', 2)


def test_methods(start, asker):
    process = start(handler=Busy)
    methods = asker(process).call('pyams_zmq.methods')
    assert methods['compute_for'] == {
        'signature': '(path)',
        'doc': 'Compute while the file is missing.',
        'timeout': None,
        'kind': 'call',
        'repeatable': False,
    }
    assert methods['who']['signature'] == '(args, *, peer)'
    assert '_private' not in methods


def test_methods_of_a_plain_callback(start, asker):
    class Plain(Process):
        def init_stream(self):
            self.rep_stream.on_recv(lambda _frames: self.rep_stream.send(b'[200,null]'))

    process = start(factory=Plain)
    client = asker(process)
    assert client.call('pyams_zmq.methods') == {}
    assert client.call('anything') is None


@pytest.mark.parametrize(
    'method',
    [
        'hold',  # another thread can run
        'compute_for',  # it holds the interpreter most of the time
    ],
)
def test_questions_while_a_method_runs(start, asker, in_thread, tmp_path, method):
    path = tmp_path / 'end'
    process = start(handler=Busy)
    client = asker(process)
    in_thread(client.call, method, str(path))
    try:
        wait_until(lambda: client.call('pyams_zmq.stats')['in_flight'], TIMEOUT)
        for _ in range(3):
            in_thread(client.call, 'echo', 1)
        wait_until(lambda: client.call('pyams_zmq.stats')['queue'] == 3, TIMEOUT)
        stats = client.call('pyams_zmq.stats')
        assert stats['queue_bytes'] > 0
        assert stats['oldest'] > 0
        assert stats['workers'][0]['state'] == 'busy'
        assert method in client.call('pyams_zmq.methods')
    finally:
        path.touch()
    wait_until(lambda: client.call('pyams_zmq.stats')['calls'] == 4, TIMEOUT)
    stats = client.call('pyams_zmq.stats')
    assert (stats['queue'], stats['queue_bytes'], stats['in_flight']) == (0, 0, 0)


def test_questions_while_all_threads_are_busy(start, asker, in_thread, tmp_path):
    path = tmp_path / 'end'
    process = start(factory=Concurrent, handler=Busy)
    client = asker(process)
    for _ in range(5):
        in_thread(client.call, 'hold', str(path))
    try:
        wait_until(lambda: client.call('pyams_zmq.stats')['queue'] == 3, TIMEOUT)
        assert client.call('pyams_zmq.stats')['in_flight'] == 2
    finally:
        path.touch()
    wait_until(lambda: client.call('pyams_zmq.stats')['calls'] == 5, TIMEOUT)


def test_order_and_turns(start, in_thread, asker, tmp_path):
    """Messages that were read ahead are handled in their order, those of another peer between."""
    path = tmp_path / 'end'
    process = start(handler=Busy)
    client = asker(process)
    in_thread(client.call, 'hold', str(path))
    try:
        wait_until(lambda: client.call('pyams_zmq.stats')['in_flight'], TIMEOUT)
        with zmq.Context() as context, context.socket(zmq.DEALER) as many:
            many.linger = 0
            many.connect(process.bound_address)
            count = MAX_WAITING + 500
            for number in range(count):
                many.send_multipart([b'', json.dumps(['echo', number]).encode()])
            wait_until(lambda: client.call('pyams_zmq.stats')['queue'] >= MAX_WAITING, TIMEOUT)
            path.touch()
            replies = [json.loads(many.recv_multipart()[-1]) for _ in range(count)]
            assert replies == [[200, number] for number in range(count)]
    finally:
        path.touch()


def test_binary_frames_and_bad_messages_while_a_method_runs(start, asker, in_thread, tmp_path):
    path = tmp_path / 'end'
    process = start(handler=Busy)
    client = asker(process)
    in_thread(client.call, 'hold', str(path))
    try:
        wait_until(lambda: client.call('pyams_zmq.stats')['in_flight'], TIMEOUT)
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(process.bound_address)
            dealer.send(b'without a delimiter')
            dealer.send_multipart([b'', b'frame', b'["pyams_zmq.ping", null]'])
            dealer.send_multipart([b'', b'["echo", "pyams_zmq.ping"]'])
            wait_until(lambda: client.call('pyams_zmq.stats')['queue'] == 3, TIMEOUT)
            path.touch()
            replies = [json.loads(dealer.recv_multipart()[-1]) for _ in range(3)]
        assert replies[0][0] == 400
        assert replies[1][0] == 404
        assert replies[2] == [200, 'pyams_zmq.ping']
    finally:
        path.touch()
    assert client.call('pyams_zmq.stats')['refused'] == 2


def test_questions_on_another_stream_while_a_method_runs(start, asker, in_thread, tmp_path):
    class Two(Process):
        def init_stream(self):
            super().init_stream()
            self.stream(zmq.REP, second, bind=True, callback=lambda _frames: None)

    second = f'ipc://{tmp_path}/second'
    path = tmp_path / 'end'
    process = start(factory=Two, handler=Busy)
    client = asker(process)
    in_thread(client.call, 'hold', str(path))
    try:
        wait_until(lambda: client.call('pyams_zmq.stats')['in_flight'], TIMEOUT)
        with ZMQClient(second, timeout=TIMEOUT) as other:
            assert other.call('pyams_zmq.ping')['pid'] == process.pid
            assert other.call('pyams_zmq.stats')['in_flight'] == 1
    finally:
        path.touch()


def test_questions_while_a_callback_has_not_replied(start, asker):
    class Later(Process):
        def init_stream(self):
            self.rep_stream.on_recv(lambda _frames: None)

    process = start(factory=Later)
    client = asker(process)
    with pytest.raises(ZMQTimeoutError):
        client.call('anything', timeout=0.1)
    stats = client.call('pyams_zmq.stats')
    assert stats['in_flight'] == 1
    assert stats['workers'][0]['state'] == 'busy'


def test_thread_that_cannot_be_started(monkeypatch):
    def fail(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Attendant, 'start', fail)
    process = Process()
    process.start()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        process.wait_ready()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def test_questions_while_it_drains(start, asker, in_thread, tmp_path):
    path = tmp_path / 'end'
    process = start(factory=Concurrent, handler=Busy)
    client = asker(process)
    in_thread(client.call, 'hold', str(path))
    wait_until(lambda: client.call('pyams_zmq.stats')['in_flight'], TIMEOUT)
    try:
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: client.call('pyams_zmq.ping')['state'] == 'draining', TIMEOUT)
        assert client.call('pyams_zmq.stats')['workers'][0]['state'] == 'leaving'
        with pytest.raises(ZMQRemoteError, match='503'):
            client.call('echo', 1)
    finally:
        path.touch()
    process.join(TIMEOUT)
    assert not is_running(process.pid)


def test_access(start, asker, monkeypatch):
    monkeypatch.setattr(inspection_module, 'parse_ip', lambda _address: ip_address('192.0.2.1'))
    process = start(factory=Restricted, auth=['alice:a', 'bob:b'])
    assert asker(process, auth='alice:a').call('pyams_zmq.stats')['calls'] == 0
    bob = asker(process, auth='bob:b')
    assert bob.call('pyams_zmq.ping')['state'] == 'up'
    for name in 'stats', 'methods', 'reload', 'restart':
        with pytest.raises(ZMQRemoteError, match='add it to stats_users') as error:
            bob.call(f'pyams_zmq.{name}')
        assert error.value.status == 403


def test_users_without_a_name(start):
    process = Process()
    process.stats_users = 'alice'
    with pytest.raises(TypeError, match="Bad stats_users 'alice': write a collection of names"):
        process.start()


def test_behind_a_device(start, asker, ask):
    """Its address is that of the device, and not known here: it can only be pinged."""

    class Connecting(Process):
        def init_stream(self):
            super().init_stream()
            with zmq.Context() as context, context.socket(zmq.DEALER) as probe:
                port = probe.bind_to_random_port('tcp://127.0.0.1')
            stream, _port = self.stream(zmq.REP, f'127.0.0.1:{port}', bind=False)
            stream.on_recv(self.rep_stream._recv_callback)
            self.port = port

        def _report_ready(self):
            self._send_report([f'tcp://127.0.0.1:{self.port}'], None)

    process = Connecting()
    with running(process), zmq.Context() as context, context.socket(zmq.DEALER) as device:
        device.linger = 0
        device.bind(process.bound_address)
        replies = []
        for name in 'ping', 'stats':
            device.send_multipart([b'', json.dumps([f'pyams_zmq.{name}', None]).encode()])
            assert device.poll(TIMEOUT * 1000)
            replies.append(json.loads(device.recv_multipart()[-1]))
    assert replies[0][1]['pid'] == process.pid
    assert replies[1] == [
        403,
        'The client at 0.0.0.0, which has no user name, may not read the statistics of the service '
        'or manage it: ask on that machine, or as a user of stats_users',
    ]


def test_withdrawn_user(start, asker, tmp_path):
    users = tmp_path / 'users'
    users.write_text('alice:a\nbob:b\n')
    users.chmod(0o600)
    process = start(auth=users)
    alice, bob = asker(process, auth='alice:a'), asker(process, auth='bob:b')
    assert bob.call('pyams_zmq.ping')['state'] == 'up'
    users.write_text('alice:a\n')
    assert alice.call('pyams_zmq.reload') is None

    def is_withdrawn():
        try:
            bob.call('pyams_zmq.ping')
        except ZMQRemoteError as error:
            return error.status == 401
        return False

    wait_until(is_withdrawn, TIMEOUT)


def test_restart(asker):
    process = Process('127.0.0.1:0')
    with (
        running(process),
        pytest.raises(ZMQRemoteError, match=r'409.*no supervisor has started it'),
    ):
        asker(process).call('pyams_zmq.restart')


def test_restart_of_a_process_that_stops():
    process = Process()
    process.draining = True
    process.restart()
    assert process._exit_code == 0


def test_restart_by_a_supervisor(tmp_path, asker, caplog):
    address = f'ipc://{tmp_path}/s'
    supervisor = SupervisorProcess({'converter': lambda: Process(address)})
    supervisor.start()
    try:
        client = ZMQClient(address, timeout=TIMEOUT)
        pid = client.call('pyams_zmq.ping')['pid']
        assert client.call('pyams_zmq.restart') is None

        def is_replaced():
            with suppress(ZMQUnreachableError):  # the connection to the former one was lost
                return client.call('pyams_zmq.ping')['pid'] != pid
            return False

        wait_until(is_replaced, TIMEOUT)
        client.close()
    finally:
        supervisor.stop()


def test_base_class():
    inspection = Inspection(Process())
    for ask in inspection.restart, inspection.methods, inspection._measure:
        with pytest.raises(NotImplementedError):
            ask()


def test_version(monkeypatch):
    assert inspection_module._version() == '3.0.0'

    def find_nothing(_name):
        raise inspection_module.PackageNotFoundError

    monkeypatch.setattr(inspection_module, 'version', find_nothing)
    assert inspection_module._version.__wrapped__() == 'unknown'


def test_hung_process(start, asker):
    process = start()
    client = asker(process)
    client.call('pyams_zmq.ping')
    freeze(process.pid)
    try:
        with pytest.raises(ZMQTimeoutError):
            client.call('pyams_zmq.ping', timeout=0.1)
    finally:
        os.kill(process.pid, signal.SIGCONT)
