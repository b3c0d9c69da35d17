# SPDX-License-Identifier: ZPL-2.1
"""ZMQClient: results and errors of calls, connections and forks."""

import errno
import gc
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.context import ForkProcess

import pytest
import zmq

from checks import AT_ONCE, check_attempts, open_fds, running_threads, wait_until
from pyams_zmq.client import MAX_IDLE, ZMQClient
from pyams_zmq.client import call as call_module
from pyams_zmq.client.call import CallConnection
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.client.socket import get_context
from pyams_zmq.exceptions import (
    ZMQBaseError,
    ZMQClosedError,
    ZMQMessageError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.transaction import send_on_commit
from pyams_zmq.wire.message import MAX_MESSAGE_SIZE, decode_reply, encode_request


def test_call(client):
    assert client.call('echo', {'a': [1, 'é', None]}) == {'a': [1, 'é', None]}
    assert client.call('echo') is None
    assert client.call('async_echo', 1) == 1


@pytest.mark.parametrize('status', [200, 201, 299])
def test_good_status(client, status):
    assert client.call('status', status) == 'payload'


@pytest.mark.parametrize('status', [100, 199, 300, 401, 404, 503, 599])
def test_bad_status(client, status):
    with pytest.raises(ZMQRemoteError) as error:
        client.call('status', status)
    assert (error.value.status, error.value.payload, error.value.text) == (
        status,
        'payload',
        'payload',
    )
    assert str(error.value) == f'{status} payload'
    assert client.call('echo', 1) == 1


@pytest.mark.parametrize(
    'reply',
    [
        None,
        200,
        'text',
        [],
        [200],
        [200, 1, 2],
        ['200', 1],
        [200.0, 1],
        [True, 1],
        [99, 1],
        [600, 1],
        [-404, 1],
        [20000, 1],
        {'a': 1},
        [1, 2],
    ],
)
def test_another_form_of_reply(client, reply):
    """It is what the method has returned."""
    assert client.request(['raw', reply]) == reply
    assert client.call('raw', reply) == reply


def test_errors_are_builtins():
    assert issubclass(ZMQTimeoutError, TimeoutError)
    assert issubclass(ZMQRefusedError, ConnectionRefusedError)
    assert issubclass(ZMQUnreachableError, ConnectionError)
    assert issubclass(ZMQRemoteError, RuntimeError)
    for error in (ZMQTimeoutError, ZMQRefusedError, ZMQUnreachableError, ZMQRemoteError):
        assert issubclass(error, ZMQBaseError)


def test_arguments_without_a_json_form(client):
    with pytest.raises(TypeError, match=r'^object has no JSON form: .* \(at \$\[1\]\.cover\)$'):
        client.call('echo', {'cover': object()})
    with pytest.raises(ValueError, match='JSON'):
        client.call('echo', '\ud800')
    with pytest.raises(ZMQMessageError, match='413'):
        client.call('echo', 'x' * 33 * 1024 * 1024)
    assert client.call('echo', 1) == 1


def test_reply_that_is_not_json():
    with zmq.Context() as context, context.socket(zmq.REP) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with ThreadPoolExecutor() as pool, ZMQClient(f'127.0.0.1:{port}') as client:
            call = pool.submit(client.call, 'echo')
            server.recv()
            server.send(b'hello')
            with pytest.raises(ZMQReplyError, match='not JSON'):
                call.result()


@pytest.mark.parametrize(
    'options', [{'timeout': 0}, {'timeout': -1}, {'timeout': 'x'}, {'timeout': float('nan')}]
)
def test_bad_options(client, options):
    with pytest.raises(ValueError, match='Bad timeout'):
        ZMQClient('127.0.0.1:1', **options)
    with pytest.raises(ValueError, match='Bad timeout'):
        client.call('echo', **options)


@pytest.mark.parametrize('address', ['localhost', '*:5555', None, 'http://localhost:1'])
def test_bad_address(address):
    with pytest.raises(ValueError, match='Bad ØMQ address'):
        ZMQClient(address)


@pytest.mark.parametrize('socket_type', [zmq.REP, zmq.ROUTER], ids=['REP', 'ROUTER'])
def test_server_of_pyzmq(socket_type):
    with zmq.Context() as context, context.socket(socket_type) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with ThreadPoolExecutor() as pool, ZMQClient(f'127.0.0.1:{port}') as client:
            for _ in range(3):
                call = pool.submit(client.call, 'echo')
                *envelope, _message = server.recv_multipart()
                server.send_multipart([*envelope, b'[200, "here"]'])
                assert call.result() == 'here'


# Time-outs


def test_timeout(client):
    start = time.monotonic()
    with pytest.raises(ZMQTimeoutError, match=r'has not replied within 0\.2 s'):
        client.call('count', 0.5, timeout=0.2)
    assert 0.2 <= time.monotonic() - start < AT_ONCE
    # The late reply is not taken for this one.
    assert client.call('echo', 'next') == 'next'
    assert client.call('count', 0) == 2


def test_timeouts_in_a_row(client):
    for number in range(20):
        with pytest.raises((ZMQTimeoutError, ZMQUnreachableError)):
            client.call('count', 0.02, timeout=0.001 + number / 2000)
    assert client.call('echo', 'last') == 'last'


def test_no_service(address):
    with ZMQClient(address, timeout=0.2) as client:
        start = time.monotonic()
        with pytest.raises(
            ZMQUnreachableError, match=r'No service has answered at ipc://.* 0\.2 s'
        ):
            client.call('echo')
        assert 0.2 <= time.monotonic() - start < AT_ONCE


def test_late_service(start, address):
    with ThreadPoolExecutor() as pool, ZMQClient(address) as client:
        call = pool.submit(client.call, 'echo', 1)
        wait_until(call.running)
        start(address)
        assert call.result() == 1


def test_restarted_service(start, address):
    with ZMQClient(address) as client:
        for number in range(3):
            process = start(address)
            assert client.call('echo', number) == number
            process.stop()
            with pytest.raises(ZMQUnreachableError):
                client.call('echo', timeout=0.1)


def test_killed_service(start, address, tmp_path):
    process = start(address)
    path = tmp_path / 'in hand'
    with ThreadPoolExecutor() as pool, ZMQClient(address) as client:
        call = pool.submit(client.call, 'wait_for', str(path))
        wait_until(path.exists)
        begin = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ZMQUnreachableError, match='was lost; the call may have run or not'):
            call.result()
        assert time.monotonic() - begin < AT_ONCE
        process.join()
        start(address)
        assert client.call('echo', 'again') == 'again'


def test_stopping_service_replies(start, address, tmp_path):
    process = start(address)
    path = tmp_path / 'in hand'
    with ThreadPoolExecutor() as pool, ZMQClient(address) as client:
        call = pool.submit(client.call, 'wait_for', str(path))
        wait_until(path.exists)
        stop = pool.submit(process.stop)
        path.unlink()
        assert call.result() == str(path)
        stop.result()


# Retries


def test_retries(start, address):
    with ThreadPoolExecutor() as pool, ZMQClient(address, timeout=0.2) as client:
        with pytest.raises(ZMQUnreachableError):
            client.call('echo', retries=2)
        call = pool.submit(client.call, 'echo', 1, retries=100)
        start(address)
        assert call.result() == 1


def test_retries_are_not_the_default(client):
    with pytest.raises(ZMQTimeoutError):
        client.call('count', 0.3, timeout=0.1)
    assert client.call('count', 0, timeout=5) == 2


def test_retry_runs_again(process):
    with ZMQClient(process.bound_address, timeout=0.5, retries=5) as client:
        assert client.call('slow_at_first', 0.6) >= 2


@pytest.mark.parametrize('send_deadline', [False, True])
def test_each_attempt_has_its_deadline(send_deadline):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port('tcp://127.0.0.1')
        with (
            ZMQClient(
                f'127.0.0.1:{port}', timeout=0.6, retries=1, send_deadline=send_deadline
            ) as client,
            pytest.raises(ZMQTimeoutError),
        ):
            client.call('who', 1)
        check_attempts(server, send_deadline)


def test_refusal_is_not_retried(start, monkeypatch):
    attempts, exchange = [], CallConnection.exchange
    monkeypatch.setattr(
        CallConnection, 'exchange', lambda *args: attempts.append(args) or exchange(*args)
    )
    process = start(auth='user:password')
    client = ZMQClient(process.bound_address, auth='user:wrong', retries=9)
    with client, pytest.raises(ZMQRefusedError):
        client.call('echo')
    assert len(attempts) == 1


def test_reply_arrives_just_before_the_loss(monkeypatch):
    """The call looks for a reply a moment too early, and then reads of the loss."""
    receive, looks = call_module.receive, []

    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 5000
        port = server.bind_to_random_port('tcp://127.0.0.1')

        def look_too_early(socket):
            looks.append(socket)
            if len(looks) > 1:
                return receive(socket)
            monitor = socket._monitor
            wait_until(lambda: monitor.read_events() or monitor.state.is_connected)
            assert server.poll(5000)
            *envelope, _request = server.recv_multipart()
            server.send_multipart([*envelope, b'[200, "late"]'])
            assert socket.poll(5000)
            server.close()
            assert monitor.socket.poll(5000)
            return None

        monkeypatch.setattr(call_module, 'receive', look_too_early)
        with ZMQClient(f'127.0.0.1:{port}') as client:
            assert client.call('echo') == 'late'
    assert len(looks) == 2


def test_error_status_is_not_retried(process):
    with ZMQClient(process.bound_address, retries=3) as client:
        with pytest.raises(ZMQRemoteError):
            client.call('status', 503)
        assert client.call('count', 0) == 1


# Limits


def test_largest_message(client):
    assert client.max_message_size == MAX_MESSAGE_SIZE
    client.max_message_size = 100
    for method in (client.call, client.send, partial(send_on_commit, client)):
        with pytest.raises(ZMQMessageError, match='bytes; the limit is 100') as error:
            method('echo', 'x' * 100)
        assert error.value.status == 413
    assert client.call('echo', 'x' * 80) == 'x' * 80


def test_no_descriptor_is_left(process):
    with ZMQClient(process.bound_address) as client:
        get_context()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            for method in (client.call, client.send):
                with pytest.raises(OSError, match=os.strerror(errno.EMFILE)) as error:
                    method('echo')
                assert error.value.errno == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert client.call('echo', 1) == 1


# Deadlines


def test_service_does_not_start_a_call_after_its_deadline(process, tmp_path):
    path = tmp_path / 'in hand'
    with (
        ZMQClient(process.bound_address, send_deadline=True) as client,
        ThreadPoolExecutor() as pool,
    ):
        busy = pool.submit(client.call, 'wait_for', str(path))
        wait_until(path.exists)
        with pytest.raises(ZMQTimeoutError):
            client.call('count', 0, timeout=0.1)
        path.unlink()
        assert busy.result() == str(path)
        assert client.call('count', 0) == 1


@pytest.mark.parametrize('timeout', [5, float('inf')])
@pytest.mark.parametrize(
    'message', [['raw', {'a': 1}], {'a': 1}, None, 'ab', ['raw'], ['raw', 1, 2], [1, 2]]
)
def test_only_requests_have_a_deadline(message, timeout):
    sent = decode_reply(encode_request(message, timeout))
    if message == ['raw', {'a': 1}] and timeout == 5:
        assert sent[:2] == message
        assert 4 < sent[2]['deadline'] - time.time() <= 5
    else:
        assert sent == message


@pytest.mark.parametrize(
    ('message', 'status'),
    [
        (['echo', 1, {'deadline': 4e9}], 200),
        (['echo', 1, {'deadline': 1}], 504),
        (['echo', 1, {}], 200),
        (['echo', 1, None], 200),
        (['echo', 1, {'deadline': None}], 400),
        (['echo', 1, {'deadline': '1'}], 400),
        (['echo', 1, {'deadline': 4e9, 'more': 1}], 200),
        (['echo', 1, 4e9], 400),
        (['echo', 1, {'deadline': 4e9}, 1], 400),
    ],
)
def test_deadline_of_a_message(client, message, status):
    assert client.request(message)[0] == status


# Access


@pytest.mark.parametrize('auth', [None, 'user:wrong', 'other:password'])
def test_refused(start, auth):
    process = start(auth='user:password')
    with ZMQClient(process.bound_address, auth=auth) as client:
        for _ in range(2):
            begin = time.monotonic()
            with pytest.raises(ZMQRefusedError, match='check user, password') as error:
                client.call('echo')
            assert time.monotonic() - begin < AT_ONCE
            assert process.bound_address in str(error.value)
            assert 'wrong' not in str(error.value) + repr(client)
    with ZMQClient(process.bound_address, auth='user:password') as client:
        assert client.call('echo', 1) == 1


def test_refused_before_it_is_sent(start, monkeypatch):
    process = start(auth='user:password')
    # The refusal comes before the monitor is read: the socket has no room for a message. Now and
    # then libzmq keeps the room and connects again; then the test takes another connection.
    for _ in range(100):
        connection = CallConnection(ServiceAddress.parse(process.bound_address, None, None))
        deadline = time.monotonic() + 0.5
        while connection._socket.get(zmq.EVENTS) & zmq.POLLOUT and time.monotonic() < deadline:
            pass
        if time.monotonic() < deadline:
            break
        connection.close()
    else:
        pytest.fail('libzmq has kept the room of each connection')
    monkeypatch.setattr(connection._monitor, 'read_events', lambda: False)
    with pytest.raises(ZMQRefusedError, match='check user, password'):
        connection.exchange(b'["echo", 1]', 5)
    connection.close()


def test_refused_address(start):
    process = start(clients='10.0.0.1')
    with ZMQClient(process.bound_address) as client, pytest.raises(ZMQRefusedError):
        client.call('echo')


def test_server_of_another_kind():
    """It sends no greeting."""
    with zmq.Context() as context, context.socket(zmq.STREAM) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        client = ZMQClient(f'127.0.0.1:{port}', timeout=0.3)
        with client, pytest.raises(ZMQUnreachableError):
            client.call('echo')


# Threads, forks, the end


def test_threads(client):
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda number: client.call('echo', number), range(500))) == list(
            range(500)
        )
    assert len(client._idle.get()) <= MAX_IDLE


def test_connections_are_kept(client):
    client.call('echo')
    [connection] = client._idle.get()
    for _ in range(10):
        client.call('echo')
    assert client._idle.get() == [connection]


def test_forks(client):
    client.call('echo')

    def run():
        assert client.call('echo', 'child') == 'child'
        client.close()

    stop = threading.Event()

    def talk():
        while not stop.is_set():
            client.call('echo', 'parent')

    talker = threading.Thread(target=talk)
    talker.start()
    for _ in range(10):
        child = ForkProcess(target=run)
        child.start()
        child.join(10)
        assert child.exitcode == 0
    stop.set()
    talker.join()
    assert client.call('echo', 1) == 1


def test_terminated_context(client):
    """The context that all client sockets of this process share was destroyed."""
    client.call('echo')
    get_context().destroy(0)
    assert client.call('echo', 1) == 1


def test_closed(process):
    client = ZMQClient(process.bound_address)
    client.call('echo')
    client.close()
    client.close()
    with pytest.raises(ZMQClosedError, match='was closed'):
        client.call('echo')


def test_closed_during_a_call(process, tmp_path):
    client = ZMQClient(process.bound_address)
    path = tmp_path / 'in hand'
    with ThreadPoolExecutor() as pool:
        call = pool.submit(client.call, 'wait_for', str(path))
        wait_until(path.exists)
        client.close()
        path.unlink()
        assert call.result() == str(path)
    assert not client._idle.get()


@pytest.mark.parametrize('close', [ZMQClient.close, lambda client: None], ids=['closed', 'dropped'])
def test_nothing_is_left(process, close):
    with ZMQClient(process.bound_address) as other:  # the context stays
        other.call('echo')
        fds, threads, errors = None, running_threads(), []
        for _ in range(20):
            client = ZMQClient(process.bound_address)
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(client.call, ['echo'] * 6))
            try:
                client.call('sleep', 0.02, timeout=0.001)
            except ZMQTimeoutError as error:
                errors.append(str(error))  # without its traceback, which has the client
            close(client)
            del client
            gc.collect()
            fds = fds or open_fds()
        wait_until(lambda: open_fds() <= fds)
        assert running_threads() <= threads
    assert errors  # now and then, this thread gets its turn too late for one


def test_repr(process):
    with ZMQClient(process.bound_address, auth='user:secret') as client:
        assert repr(client) == f'<ZMQClient of {process.bound_address}>'
        assert client.address == process.bound_address


@pytest.mark.parametrize('interval', [0.02, 0.005])
def test_timeout_under_signals(interval):
    """Signals, for example of a sampling profiler, do not postpone the time-out of a call."""
    former = signal.signal(signal.SIGALRM, lambda *args: None)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as silent:
        port = silent.bind_to_random_port('tcp://127.0.0.1')
        signal.setitimer(signal.ITIMER_REAL, interval, interval)
        # It ends in any case: the signals do.
        end = threading.Timer(20, signal.setitimer, (signal.ITIMER_REAL, 0))
        end.start()
        begin = time.monotonic()
        try:
            with (
                ZMQClient(f'127.0.0.1:{port}', timeout=0.3) as client,
                pytest.raises(ZMQTimeoutError),
            ):
                client.call('echo')
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
            end.cancel()
            end.join()
        assert time.monotonic() - begin < 15
