# SPDX-License-Identifier: ZPL-2.1
"""Host names with IPv6 addresses only, and others."""

import asyncio
import shutil
import socket
import subprocess
import threading
import time
from contextlib import suppress

import pytest
import zmq

from checks import AT_ONCE, TIMEOUT, until, wait_until
from handlers import MessageHandler, Process
from namespaces import name_hosts, run_unshared
from pool_handlers import Pool
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import connection as connection_module
from pyams_zmq.client import socket as socket_module
from pyams_zmq.device import ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQUnreachableError
from pyams_zmq.pool import PoolWorker
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.testing import running
from pyams_zmq.wire import names as names_module
from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.names import look_up, needs_ipv6

SIX = ('::1',)
FOUR = ('127.0.0.1',)
BOTH = SIX + FOUR


def port_of(address):
    return address.rpartition(':')[2]


def call(address):
    with ZMQClient(address, timeout=TIMEOUT) as client:
        return client.call('echo', 1)


def respond(address):
    with zmq_socket(address) as sock:
        sock.send_json(['echo', 1])
        return zmq_response(sock, timeout=TIMEOUT)[1]


def acall(address):
    async def run():
        async with AsyncZMQClient(address, timeout=TIMEOUT) as client:
            return await client.call('echo', 1)

    return asyncio.run(run())


def send(address):
    """Use the sender, which waits until its service is connected."""
    with ZMQClient(address, timeout=TIMEOUT) as client:
        client.prepare()
        client.send('echo', 1)
    return 1


def through_a_device(factory):
    def forward(address):
        device = factory(zmq.QUEUE)
        device.bind_in('127.0.0.1')
        device.connect_out(address)
        device.start()
        try:
            return call(device.in_address)
        finally:
            device.stop()

    return forward


class Forwarder(Process):
    """Sends each message to another address, on a stream that it connects."""

    def init_stream(self):
        super().init_stream()
        target, _port = self.stream(zmq.DEALER, self.target, bind=False)
        source, port = self.stream(zmq.REP, '127.0.0.1', bind=True)
        source.on_recv(lambda frames: target.send_multipart([b'', *frames]))
        target.on_recv(lambda frames: source.send(frames[-1]))
        self.bound_address = f'tcp://127.0.0.1:{port}'


def through_a_stream(address):
    process = Forwarder()
    process.target = address
    with running(process):
        return call(process.bound_address)


CLIENTS = [
    call,
    respond,
    send,
    acall,
    through_a_device(ThreadDevice),
    through_a_device(ProcessDevice),
    through_a_stream,
]


def check_clients(folder):
    name_hosts(folder, six=SIX, four=FOUR, both=BOTH)
    for host, names in (('[::1]', ['six']), ('127.0.0.1', ['four', 'both'])):
        with running(Process(host)) as process:
            for name in names:
                address = f'{name}.test:{port_of(process.bound_address)}'
                for client in CLIENTS:
                    assert client(address) == 1, (client, address)


def test_clients(tmp_path):
    """A name that has both counts as one of IPv4, as most services listen there only."""
    run_unshared(check_clients, tmp_path)


def check_worker(folder):
    name_hosts(folder, six=FOUR)
    pool = Pool('127.0.0.1', workers=1, worker_address='[::1]', worker_auth='w:secret')
    with running(pool):
        broker = f'six.test:{port_of(pool.bound_worker_address)}'

        def make():
            return PoolWorker(broker, MessageHandler, 'w:secret')

        supervisor = SupervisorProcess({'worker': make})
        supervisor.start()
        name_hosts(folder, six=SIX)
        wait_until(lambda: len(pool.stats()['workers']) == 2)
        supervisor.stop()


def test_worker(tmp_path, monkeypatch):
    """A worker connects again if its broker has got another address."""
    monkeypatch.setattr(names_module, 'LIFETIME', 0.1)
    run_unshared(check_worker, tmp_path)


def check_slow_worker(folder):
    name_hosts(folder, six=SIX)
    ask = socket.getaddrinfo

    def ask_slowly(*args, **options):
        time.sleep(0.1 + names_module.LOOKUP_TIMEOUT)  # as when the first name server is down
        return ask(*args, **options)

    socket.getaddrinfo = ask_slowly  # in this fork
    with running(
        Pool('127.0.0.1', workers=1, worker_address='[::1]', worker_auth='w:secret')
    ) as pool:
        broker = f'six.test:{port_of(pool.bound_worker_address)}'
        with running(PoolWorker(broker, MessageHandler, 'w:secret')) as worker:
            assert worker.is_alive()


def test_worker_while_names_are_found_slowly(tmp_path):
    """It is not replaced by one that would wait as long again."""
    run_unshared(check_slow_worker, tmp_path)


def check_late_name(folder):
    """The clients are there before the name."""
    name_hosts(folder)

    async def acall_later(address):
        async with AsyncZMQClient(address, timeout=TIMEOUT) as client:
            with pytest.raises(ZMQUnreachableError):
                await client.call('echo', 1, timeout=0.2)
            under_way = asyncio.ensure_future(client.call('echo', 1, timeout=1))
            [connection] = client._connections.get()
            await until(lambda: connection._calls)
            name_hosts(folder, six=SIX)
            deadline = time.monotonic() + TIMEOUT
            answer = None
            while answer != 1:
                assert time.monotonic() < deadline
                with suppress(ZMQUnreachableError):
                    answer = await client.call('echo', 1, timeout=0.2)
            with pytest.raises(ZMQUnreachableError):
                await under_way
            return answer

    with running(Process('[::1]')) as process:
        address = f'six.test:{port_of(process.bound_address)}'
        with ZMQClient(address, timeout=0.2) as client:
            with pytest.raises(ZMQUnreachableError):
                client.call('echo', 1)
            assert asyncio.run(acall_later(address)) == 1
            assert client.call('echo', 1, timeout=TIMEOUT) == 1


def test_late_name(tmp_path, monkeypatch):
    monkeypatch.setattr(names_module, 'RETRY', 0.1)
    run_unshared(check_late_name, tmp_path)


def check_interface():
    subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
    subprocess.run(['ip', 'address', 'delete', '127.0.0.1/8', 'dev', 'lo'], check=True)
    with running(Process('lo:*')) as process:
        assert process.bound_address.startswith('tcp://[::1]:')
        assert call(process.bound_address) == 1


@pytest.mark.skipif(not shutil.which('ip'), reason='it needs the program ip')
def test_interface_with_ipv6_only():
    run_unshared(check_interface, has_network=False)


@pytest.fixture
def slow_lookup(monkeypatch):
    """Let look-ups take until an event is set; yield the event and their number."""
    event, count = threading.Event(), []
    names_module._lookups.get().clear()

    def getaddrinfo(*args, **kwargs):
        count.append(args)
        event.wait()
        return [(socket.AF_INET6, None, None, None, None)]

    monkeypatch.setattr(names_module.network, 'getaddrinfo', getaddrinfo)
    monkeypatch.setattr(names_module, 'LOOKUP_TIMEOUT', 0.05)
    yield event, count
    event.set()
    names_module._lookups.get().clear()


def test_slow_lookup(slow_lookup, monkeypatch):
    """A client does not wait for a slow DNS for longer; all of them wait for one answer."""
    event, count = slow_lookup
    endpoint = Endpoint.parse('slow.test:1', bind=False)

    async def acall():
        async with AsyncZMQClient('slow.test:1', timeout=0.01) as client:
            await client.call('echo')

    monkeypatch.setattr('pyams_zmq.aio.client.LOOKUP_TIMEOUT', 0.02)
    with pytest.raises(ZMQUnreachableError):
        asyncio.run(acall())
    assert not needs_ipv6(endpoint, 0.01)
    assert not needs_ipv6(endpoint, 0.01)
    assert len(count) == 1
    event.set()
    wait_until(lambda: needs_ipv6(endpoint))


@pytest.fixture
def _long_wait(monkeypatch):
    """Let everything that waits for an answer wait long, by default."""
    monkeypatch.setattr(connection_module.configure, '__kwdefaults__', {'lookup_timeout': TIMEOUT})
    for function in (socket_module.open_socket, socket_module.open_connection):
        defaults = (*function.__defaults__[:-1], TIMEOUT)
        monkeypatch.setattr(function, '__defaults__', defaults)


@pytest.mark.usefixtures('_long_wait')
def test_slow_lookup_and_messages(slow_lookup):
    """The messages to another service do not wait for it."""
    _event, count = slow_lookup
    with (
        running(Process('127.0.0.1')) as process,
        ZMQClient(process.bound_address) as live,
        ZMQClient('localhost:1') as slow,
    ):
        live.prepare(timeout=TIMEOUT)
        start = time.monotonic()
        with pytest.raises(ZMQUnreachableError):
            slow.prepare(timeout=0.01)
        wait_until(lambda: count)
        live.send('echo', 1)
        assert time.monotonic() < start + AT_ONCE
        wait_until(lambda: not len(live._queue.get()))


@pytest.mark.usefixtures('_long_wait')
def test_slow_lookup_and_calls(slow_lookup):
    """It takes a part of the time of a call; later, nothing waits for the same answer."""
    _event, count = slow_lookup
    start = time.monotonic()
    with ZMQClient('localhost:1', timeout=0.05) as client:
        for _number in range(2):
            with pytest.raises(ZMQUnreachableError, match='for 0.05 s'):
                client.call('echo', 1)

    async def acall():
        async with AsyncZMQClient('localhost:1', timeout=0.05) as client:
            with pytest.raises(ZMQUnreachableError, match='for 0.05 s'):
                await client.call('echo')

    asyncio.run(acall())
    zmq_socket('localhost:1').close()
    assert time.monotonic() < start + AT_ONCE
    assert len(count) == 1


def test_answer_that_has_expired(slow_lookup, monkeypatch):
    """It counts until the next one comes; so does that of a look-up that took too long."""
    event, count = slow_lookup
    endpoint = Endpoint.parse('slow.test:1', bind=False)
    assert not needs_ipv6(endpoint, 0.01)
    assert not needs_ipv6(endpoint, TIMEOUT)
    event.set()
    wait_until(lambda: needs_ipv6(endpoint))
    assert len(count) == 1
    event.clear()
    look_up('slow.test').expires = 0
    assert needs_ipv6(endpoint, 0)
    assert needs_ipv6(endpoint, TIMEOUT)
    wait_until(lambda: len(count) == 2)


def test_name_that_was_not_found(monkeypatch):
    """Its next answer is awaited, if there was one in time."""
    for assumed in (None, False):
        lookup = look_up(f'{assumed}.invalid')
        lookup.assumed = assumed
        lookup.answer.result(TIMEOUT)
        assert lookup.renew().assumed is assumed


def test_no_thread(monkeypatch):
    """Python starts none when it ends."""

    def fail(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', fail)
    assert look_up('no-thread.test').answer.result(0) is False


def test_answers_are_limited(monkeypatch):
    monkeypatch.setattr(names_module, '_MAX_NAMES', 2)
    names_module._lookups.get().clear()
    for number in range(5):
        assert look_up(f'name-{number}.invalid').answer
        assert len(names_module._lookups.get()) <= 2


@pytest.mark.parametrize('address', ['127.0.0.1:1', '[::1]:1', 'ipc://@name', 'ipc:///x'])
def test_numeric_addresses_are_not_looked_up(address):
    endpoint = Endpoint.parse(address, bind=False)
    assert endpoint.name is None
    assert needs_ipv6(endpoint) == address.startswith('[')
