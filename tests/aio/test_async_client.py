# SPDX-License-Identifier: ZPL-2.1
"""The client for coroutines, with real services."""

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from datetime import date
from multiprocessing.context import ForkProcess

import pytest
import uvloop
import zmq

from aio_loops import LOOPS, Runner
from checks import AT_ONCE, TIMEOUT, check_attempts, open_fds, until, wait_until
from handlers import Process, RecordingMessageHandler
from pyams_zmq.aio import AsyncZMQClient, SocketEvent, ZmqEventLoop
from pyams_zmq.aio.client import Connection
from pyams_zmq.aio.loop import get_context
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.exceptions import (
    ZMQClosedError,
    ZMQMessageError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.wire.message import MAX_MESSAGE_SIZE

CALLS = 5000
"""Simultaneous calls"""


@pytest.fixture(params=LOOPS)
def run(request):
    """Run coroutines on each kind of loop; fail if the exception handler of the loop is called."""
    runner = Runner(request.param)
    yield runner
    runner.close()
    assert [context['message'] for context in runner.errors] == []


@pytest.fixture
def process(start):
    """Process with a recording handler."""
    return start(handler=RecordingMessageHandler)


async def test_largest_message(run, process):
    async with AsyncZMQClient(process.bound_address) as client:
        assert client.max_message_size == MAX_MESSAGE_SIZE
        client.max_message_size = 100
        with pytest.raises(ZMQMessageError, match='bytes; the limit is 100'):
            await client.call('echo', 'x' * 100)
        assert await client.call('echo', 'x' * 80) == 'x' * 80


def connection_of(client):
    """Return the connection of a client, or None."""
    return next(iter(client._connections.get()), None)


async def until_sent(client):
    """Wait until the calls of a client are sent."""
    await asyncio.sleep(0)  # one iteration of the loop, which begins the calls
    await until(lambda: connection_of(client) and not connection_of(client)._unsent)


async def test_calls(run, process):
    async with AsyncZMQClient(process.bound_address) as client:
        assert await client.call('echo', {'a': [1, 'é', None]}) == {'a': [1, 'é', None]}
        assert await client.call('echo') is None
        assert await client.request(['raw', 'any']) == 'any'
        assert await client.call('raw', 'any') == 'any'
        assert await client.call('raw', [200, date(2026, 1, 2)]) == '2026-01-02'
        with pytest.raises(ZMQRemoteError, match='404 Unknown') as error:
            await client.call('unknown')
        assert error.value.status == 404
        with pytest.raises(TypeError):
            await client.call('echo', object())
        with pytest.raises(ZMQMessageError, match='413'):
            await client.call('echo', 'x' * 33 * 1024 * 1024)


@pytest.mark.parametrize('run', ['tornado', 'zmq'], indirect=True)
async def test_other_loops_of_the_client(run, process):
    """The loop of Tornado and ours: replies, a time-out, and the end."""
    async with AsyncZMQClient(process.bound_address) as client:
        assert await asyncio.gather(*[client.call('echo', n) for n in range(9)]) == [*range(9)]
        with pytest.raises(ZMQTimeoutError):
            await client.call('sleep', 0.5, timeout=0.01)
    await asyncio.sleep(0)  # one iteration of the loop, which calls connection_lost


@pytest.mark.parametrize('size', [10, 100_000])
async def test_many_at_once(run, process, size):
    text = 'x' * size
    async with AsyncZMQClient(process.bound_address) as client:
        numbers = range(CALLS // 50 if size > 10 else CALLS)
        replies = await asyncio.gather(*[client.call('echo', [n, text]) for n in numbers])
        assert replies == [[number, text] for number in numbers]
        assert not connection_of(client)._calls


def test_server_of_pyzmq(run):
    """A plain REP socket keeps the envelope."""

    def serve():
        for _ in range(10):
            server.send_json([200, server.recv_json()[1]])

    async def main():
        async with AsyncZMQClient(f'127.0.0.1:{port}') as client:
            calls = [client.call('echo', number) for number in range(10)]
            assert await asyncio.gather(*calls) == list(range(10))

    with zmq.Context() as context, context.socket(zmq.REP) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        thread = threading.Thread(target=serve)
        thread.start()
        run(main())
        thread.join()


@pytest.mark.parametrize('timeout', [0, -1, 'x', float('nan'), None])
def test_bad_timeout(timeout):
    with pytest.raises(ValueError, match='Bad timeout'):
        AsyncZMQClient('127.0.0.1:1', timeout=timeout)


async def test_longest_timeout(run, process):
    async with AsyncZMQClient(process.bound_address, timeout=float('inf')) as client:
        assert await client.call('echo', 1) == 1


# Time-outs and retries


async def test_timeout(run, process):
    async with AsyncZMQClient(process.bound_address) as client:
        begin = time.monotonic()
        with pytest.raises(ZMQTimeoutError, match=r'has not replied within 0\.2 s'):
            await client.call('count', 0.5, timeout=0.2)
        assert 0.19 <= time.monotonic() - begin < AT_ONCE
        # The late reply is not returned by the next call, which uses the same connection.
        connection = connection_of(client)
        assert await client.call('count', 0) == 2
        assert connection_of(client) is connection


async def test_no_service(run, address):
    async with AsyncZMQClient(address, timeout=0.2) as client:
        for _ in range(2):
            with pytest.raises(ZMQUnreachableError, match=r'No service has answered.* 0\.2 s'):
                await client.call('echo')
        assert not connection_of(client)._unsent


async def test_service_starts_at_the_limit(run, address):
    """A call that was refused goes on if there is a connection when it should fail."""
    async with AsyncZMQClient(address, timeout=TIMEOUT, connect_timeout=TIMEOUT) as client:
        call = asyncio.ensure_future(client.call('echo', 1))
        await until(lambda: connection_of(client) and connection_of(client)._attempts)
        connection = connection_of(client)
        [number] = connection._attempts
        connection._state.handle_event(zmq.EVENT_CONNECTED, -1)  # its handshake has not ended
        connection._expire_if_down(number, 0.0)
        assert number in connection._attempts
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_service_starts_during_the_call(run, start, address):
    async with AsyncZMQClient(address) as client:
        call = asyncio.ensure_future(client.call('echo', 1))
        await until(lambda: connection_of(client) and connection_of(client)._unsent)
        await asyncio.get_running_loop().run_in_executor(None, start, address)
        assert await call == 1


async def test_service_is_killed(run, start, address, tmp_path):
    first = start(address)
    path = tmp_path / 'in hand'
    async with AsyncZMQClient(address) as client:
        calls = [asyncio.ensure_future(client.call('wait_for', str(path))) for _ in range(3)]
        await until(path.exists)
        begin = time.monotonic()
        os.kill(first.pid, signal.SIGKILL)
        for call in calls:
            with pytest.raises(ZMQUnreachableError, match='was lost; the call may have run'):
                await call
        assert time.monotonic() - begin < AT_ONCE
        first.join()
        start(address)
        assert await client.call('echo', 'again') == 'again'


def test_reply_before_the_service_ends(run):
    """A reply is returned although the loop handles the loss of the connection together with it."""

    def serve():
        server.recv()
        server.send(b'[200, "last reply"]')
        server.close()
        context.term()

    async def main():
        async with AsyncZMQClient(f'127.0.0.1:{port}') as client:
            call = asyncio.ensure_future(client.call('echo'))
            while not connection_of(client) or connection_of(client)._unsent:
                await asyncio.sleep(0)  # iterations of the loop, until the request is sent
            thread.join()
            assert await call == 'last reply'

    context = zmq.Context()
    server = context.socket(zmq.REP)
    port = server.bind_to_random_port('tcp://127.0.0.1')
    thread = threading.Thread(target=serve)
    thread.start()
    run(main())


def test_reply_in_the_socket_of_a_lost_connection(run):
    async def main():
        async with AsyncZMQClient(f'127.0.0.1:{port}') as client:
            call = asyncio.ensure_future(client.call('echo'))
            await until(lambda: server.poll(0))
            connection = connection_of(client)
            connection._transport.pause_reading()
            server.send_multipart([*server.recv_multipart()[:-1], b'[200, "last reply"]'])
            connection._socket.poll(5000)
            connection.event_received(SocketEvent(zmq.EVENT_DISCONNECTED, 0, ''))
            assert connection.is_lost
            assert await call == 'last reply'

    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        port = server.bind_to_random_port('tcp://127.0.0.1')
        run(main())


def test_service_restarts_while_the_loop_does_not_run(run, start, address):
    client = AsyncZMQClient(address)
    for number in range(3):
        process = start(address)
        assert run(client.call('echo', number)) == number
        process.stop()
        process.join()
    client.close()


def test_terminated_context(process):
    async def main():
        async with AsyncZMQClient(process.bound_address) as client:
            call = asyncio.ensure_future(client.call('sleep', 1))
            await until_sent(client)
            loop = asyncio.get_running_loop()
            terminated = loop.run_in_executor(None, get_context(loop).term)
            with pytest.raises(ZMQClosedError, match='socket or its context was closed'):
                await call
            assert connection_of(client).is_lost
            await terminated
            assert await client.call('echo', 1) == 1

    asyncio.run(main())


async def test_retries(run, start, address):
    async with AsyncZMQClient(address, timeout=0.1) as client:
        with pytest.raises(ZMQUnreachableError):
            await client.call('echo', retries=2)
        call = asyncio.ensure_future(client.call('echo', 1, retries=100))
        await asyncio.get_running_loop().run_in_executor(None, start, address)
        assert await call == 1


@pytest.mark.parametrize('send_deadline', [False, True])
def test_each_attempt_has_its_deadline(run, send_deadline):
    async def main():
        async with AsyncZMQClient(
            f'127.0.0.1:{port}', timeout=0.6, retries=1, send_deadline=send_deadline
        ) as client:
            with pytest.raises(ZMQTimeoutError):
                await client.call('who', 1)

    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.linger = 0
        port = server.bind_to_random_port('tcp://127.0.0.1')
        run(main())
        check_attempts(server, send_deadline)


async def test_expired_request_is_not_started(run, process):
    async with AsyncZMQClient(process.bound_address, send_deadline=True) as client:
        await client.call('echo')  # until it is connected
        busy = asyncio.ensure_future(client.call('count', 0.5))
        await asyncio.sleep(0)  # one iteration of the loop, which begins the call
        with pytest.raises(ZMQTimeoutError):
            await client.call('count', 0, timeout=0.1)
        assert await busy == 1
        assert await client.call('count', 0) == 2


async def test_cancelled(run, process):
    async with AsyncZMQClient(process.bound_address) as client:
        await client.call('echo')  # until it is connected
        call = asyncio.ensure_future(client.call('count', 0.2))
        await until_sent(client)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        connection = connection_of(client)
        assert not connection._calls
        assert await client.call('count', 0) == 2
        assert connection_of(client) is connection


def test_back_pressure(run):
    """Calls that the service does not take wait in the client until their deadline."""

    async def main():
        async with AsyncZMQClient(f'127.0.0.1:{port}', timeout=1) as client:
            calls = [
                asyncio.ensure_future(client.call('echo', 'x' * 1_000_000)) for _ in range(100)
            ]
            await asyncio.wait(calls, timeout=0.5)
            connection = connection_of(client)
            assert len(connection._unsent) > 70  # the rest is on its way, or in a short queue
            assert connection._transport.get_write_buffer_size() < 3_000_000
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(result) for result in results} == {ZMQTimeoutError}
            assert not connection._unsent

    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.rcvhwm = 1
        server.rcvbuf = 4096
        port = server.bind_to_random_port('tcp://127.0.0.1')
        run(main())


# Access


def test_refused_call_is_not_repeated(run, start, monkeypatch):
    attempts, exchange = [], Connection.exchange
    monkeypatch.setattr(
        Connection, 'exchange', lambda *args: attempts.append(args) or exchange(*args)
    )
    service = start(auth='user:password')

    async def main():
        async with AsyncZMQClient(service.bound_address, auth='user:wrong', retries=9) as client:
            with pytest.raises(ZMQRefusedError):
                await client.call('echo')

    run(main())
    assert len(attempts) == 1


@pytest.mark.parametrize('auth', [None, 'user:wrong', 'other:password'])
async def test_refused(run, start, auth):
    service = start(auth='user:password')
    async with AsyncZMQClient(service.bound_address, auth=auth) as client:
        for _ in range(2):
            begin = time.monotonic()
            with pytest.raises(ZMQRefusedError, match='check user, password') as error:
                await client.call('echo')
            assert time.monotonic() - begin < AT_ONCE
            assert 'wrong' not in str(error.value) + repr(client)
    async with AsyncZMQClient(service.bound_address, auth='user:password') as client:
        assert await client.call('echo', 1) == 1


async def test_curve(run, start):
    public, secret = zmq.curve_keypair()
    my_public, my_secret = zmq.curve_keypair()
    service = start(curve=CurveServer(secret.decode(), [my_public.decode()]))

    good = CurveClient(public.decode(), my_secret.decode())
    async with AsyncZMQClient(service.bound_address, curve=good) as client:
        assert await client.call('echo', 1) == 1
    bad = CurveClient(public.decode(), secret.decode())
    async with AsyncZMQClient(service.bound_address, curve=bad) as client:
        with pytest.raises(ZMQRefusedError):
            await client.call('echo', 1)


def test_bad_arguments():
    with pytest.raises(ValueError, match='Bad ØMQ address'):
        AsyncZMQClient('localhost')
    with pytest.raises(ValueError, match='one user'):
        AsyncZMQClient('127.0.0.1:1', auth={'a': 'b', 'c': 'd'})


# Loops, forks, the end


def test_other_loop(process):
    """The client works in the next loop when the last one is closed."""
    client = AsyncZMQClient(process.bound_address)
    for loop_factory in (asyncio.new_event_loop, ZmqEventLoop, uvloop.new_event_loop) * 2:
        loop = loop_factory()
        assert loop.run_until_complete(client.call('echo', 1)) == 1
        loop.close()
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(client.call('echo', 1)) == 1
    other = asyncio.new_event_loop()
    with pytest.raises(RuntimeError, match='another loop'):
        other.run_until_complete(client.call('echo', 1))
    other.close()
    client.close()
    loop.close()


def test_fork(process):
    client = AsyncZMQClient(process.bound_address)

    def run_child():
        asyncio._set_running_loop(None)
        assert asyncio.run(client.call('echo', 'child')) == 'child'
        client.close()

    async def main():
        assert await client.call('echo', 'parent') == 'parent'
        child = ForkProcess(target=run_child)
        child.start()
        await asyncio.get_running_loop().run_in_executor(None, child.join, 10)
        assert child.exitcode == 0
        assert await client.call('echo', 'parent') == 'parent'
        client.close()

    asyncio.run(main())


async def test_closed(run, process):
    client = AsyncZMQClient(process.bound_address)
    call = asyncio.ensure_future(client.call('count', 0.2))
    await until_sent(client)
    client.close()
    client.close()
    with pytest.raises(ZMQClosedError, match='was closed'):
        await client.call('echo')
    assert await call == 1


async def test_nothing_is_left(run, process):
    errors = []

    async def use():
        async with AsyncZMQClient(process.bound_address) as client:
            await asyncio.gather(*[client.call('echo') for _ in range(5)])
            try:
                await client.call('sleep', 0.02, timeout=0.001)
            except ZMQTimeoutError as error:
                errors.append(str(error))  # without its traceback, which has the client
        await asyncio.sleep(0)  # one iteration of the loop, which calls connection_lost

    async with AsyncZMQClient(process.bound_address) as other:  # the context stays
        await other.call('echo')
        fds = None
        for _ in range(10):
            await use()
            gc.collect()
            fds = fds or open_fds()
        wait_until(lambda: open_fds() <= fds, AT_ONCE)
    assert errors  # now and then, this thread gets its turn too late for one


@pytest.mark.parametrize('sockets', [1, 2])
def test_socket_limit_of_the_client(process, sockets):
    """The client needs a socket for requests and two for the monitor."""
    loop = ZmqEventLoop()
    client = AsyncZMQClient(process.bound_address)
    loop.zmq_context.max_sockets = sockets
    with pytest.raises(OSError, match=r'^\[Errno 24\]'):
        loop.run_until_complete(client.call('echo'))
    client.close()
    loop.close()


def test_reply_and_deadline_at_once(process):
    async def main():
        async with AsyncZMQClient(process.bound_address) as client:
            call = asyncio.ensure_future(client.call('echo', 1))
            await asyncio.sleep(0)  # one iteration of the loop, which begins the call
            connection = connection_of(client)
            [number] = connection._calls
            connection.msg_received((number, b'', b'[200, 2]'))
            connection._expire(number, 1)
            assert await call == 2

    asyncio.run(main())


def test_dropped_client_is_not_in_a_cycle():
    """Else its connection would stay open until the collector runs, at any time later."""
    client = AsyncZMQClient('127.0.0.1:9')
    client._breaker.get()
    reference = weakref.ref(client)
    gc.disable()
    try:
        del client
        assert reference() is None
    finally:
        gc.enable()


async def test_unclosed_client_is_collected(run, process):
    fds = None
    for _ in range(10):
        client = AsyncZMQClient(process.bound_address)
        await client.call('echo')
        socket = connection_of(client)._socket
        del client
        gc.collect()
        await until(lambda socket=socket: socket.closed)
        fds = fds or open_fds()
    wait_until(lambda: open_fds() <= fds)


@pytest.mark.parametrize('end', [AsyncZMQClient.close, lambda client: None])
def test_loop_is_closed_under_a_call(process, end):
    async def start(client):
        call = asyncio.ensure_future(client.call('sleep', 1))
        await until_sent(client)
        return call

    fds = None
    for _ in range(5):
        client = AsyncZMQClient(process.bound_address)
        loop = asyncio.new_event_loop()
        call = loop.run_until_complete(start(client))
        call.cancel()
        loop.close()
        end(client)
        del client, loop, call
        gc.collect()
        fds = fds or open_fds()
    wait_until(lambda: open_fds() <= fds)


def test_repr(process):
    client = AsyncZMQClient(process.bound_address, auth='user:secret')
    assert repr(client) == f'<AsyncZMQClient of {process.bound_address}>'
    assert client.address == process.bound_address
    assert isinstance(process, Process)
