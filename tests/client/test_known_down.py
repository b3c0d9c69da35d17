# SPDX-License-Identifier: ZPL-2.1
"""Calls to a service that is down, by clients that know it."""

import asyncio
import socket as sockets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf

import pytest
import transaction

from calls import call, call_async
from checks import AT_ONCE, TIMEOUT, in_fork, until, wait_until
from peers import raw_server
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.client import call as call_module
from pyams_zmq.client.breaker import PAUSE, Attempt
from pyams_zmq.exceptions import ZMQRefusedError, ZMQUnreachableError
from pyams_zmq.transaction import send_on_commit

KNOWN = 'it is known to be down for .*: calls fail at once, and one tries each second'


def move_on(client, seconds=PAUSE):
    """Let the breaker of a client see a later time."""
    breaker = client._breaker.get()
    breaker._opened_at -= seconds
    breaker._missing_since -= seconds


def stop_clock(client):
    """Let the pause of the breaker last for the whole test."""
    client._breaker.get()._opened_at += TIMEOUT


@pytest.fixture
def attempts(monkeypatch):
    """The connections that were opened for calls, in order."""
    opened = []
    open_connection = call_module.open_connection

    def count(*args, **options):
        opened.append(args)
        return open_connection(*args, **options)

    monkeypatch.setattr(call_module, 'open_connection', count)
    return opened


def fail(client, match='No service has answered', **options):
    with pytest.raises(ZMQUnreachableError, match=match) as raised:
        client.call('echo', 1, **options)
    return str(raised.value)


def fail_in_threads(client, number):
    """Let each of some threads fail to call; return the texts."""
    barrier = threading.Barrier(number)

    def run(_number):
        barrier.wait()
        return fail(client)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


@pytest.fixture
def missing(tmp_path):
    """An address whose file is not there."""
    return f'ipc://{tmp_path}/echo'


@pytest.fixture(params=['port', 'file', 'silent', 'full backlog'])
def dead(request, down, missing):
    """An address without a service, and what the error says about it."""
    if request.param in ('port', 'file'):
        yield down if request.param == 'port' else missing
        return
    if request.param == 'silent':
        with raw_server(lambda connection: None) as address:
            yield address
        return
    with full_backlog() as address:
        yield address


@contextmanager
def full_backlog():
    """A port whose host does not answer any more: the kernel drops each further SYN."""
    with sockets.create_server(('127.0.0.1', 0), backlog=0) as listener:
        address = listener.getsockname()
        with sockets.create_connection(address):
            others = []
            for _number in range(4):
                other = sockets.socket()
                other.setblocking(False)
                other.connect_ex(address)
                others.append(other)
            try:
                yield f'127.0.0.1:{address[1]}'
            finally:
                for other in others:
                    other.close()


def test_later_calls_do_not_try(dead, attempts):
    with ZMQClient(dead, timeout=60, connect_timeout=0.2) as client:
        start = time.monotonic()
        first = fail(client)
        assert time.monotonic() - start < AT_ONCE
        stop_clock(client)
        for _number in range(20):
            assert fail(client, KNOWN).startswith(first)
        assert len(attempts) == 1


def test_default_is_two_seconds():
    with raw_server(lambda connection: None) as address, ZMQClient(address) as client:
        start = time.monotonic()
        fail(client, ' for 2 s; connections are accepted')
        assert 2 <= time.monotonic() - start < AT_ONCE


def test_one_thread_tries(missing, attempts):
    """Also when many call at the same time; it does not wait."""
    with ZMQClient(missing, connect_timeout=0.2) as client:
        fail(client)
        client.connect_timeout = 60
        for number in range(2, 5):
            move_on(client)
            start = time.monotonic()
            texts = fail_in_threads(client, 8)
            assert time.monotonic() - start < AT_ONCE
            assert len(attempts) == number
            assert sum('is known to be down' in text for text in texts) == 7


def test_others_fail_while_one_thread_tries(attempts):
    accepted = []
    with (
        raw_server(accepted.append) as address,
        ZMQClient(address, connect_timeout=0.1) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        fail(client)
        move_on(client)
        client.connect_timeout = 1
        trial = pool.submit(fail, client, ' for 1 s; connections are accepted')
        wait_until(lambda: len(accepted) == 2)
        for _number in range(5):
            fail(client, KNOWN)
        assert not trial.done()
        trial.result()
        assert len(attempts) == 2


def test_recovery(start, missing, attempts):
    """The first call after the pause connects, and then all of them do."""
    with ZMQClient(missing, connect_timeout=0.1) as client:
        fail(client)
        start(missing)
        move_on(client)
        client.connect_timeout = TIMEOUT
        with ThreadPoolExecutor(8) as pool:
            assert client.call('echo', 0) == 0
            assert list(pool.map(lambda number: client.call('echo', number), range(20))) == [
                *range(20)
            ]
        assert not client._breaker.get().is_open


def test_success_is_known_before_the_reply(start, missing, tmp_path):
    """The call that tries takes long; others try as soon as the service is connected."""
    busy = tmp_path / 'busy'
    with ZMQClient(missing, connect_timeout=0.1) as client, ThreadPoolExecutor(1) as pool:
        fail(client)
        start(missing)
        client.connect_timeout = TIMEOUT
        move_on(client)
        trial = pool.submit(client.call, 'wait_for', str(busy))
        wait_until(busy.exists)
        wait_until(lambda: not client._breaker.get().is_open)
        assert not trial.done()
        busy.unlink()
        trial.result()


def test_restart_under_load(start, missing, tmp_path):
    """All calls that begin while the service is away wait for it, and none fails."""
    process = start(missing)
    with ZMQClient(missing, connect_timeout=TIMEOUT) as client, ThreadPoolExecutor(8) as pool:
        client.call('echo')
        process.stop()
        process.join()
        calls = [pool.submit(client.call, 'echo', number) for number in range(8)]
        wait_until(lambda: client._breaker.get()._noticed_at > 0)
        assert not any(call.done() for call in calls)
        start(missing)
        assert [call.result() for call in calls] == [*range(8)]


def test_idle_connection_knows_how_long_it_is_down(start, missing, attempts):
    """No call waits for a service that has ended long ago."""
    process = start(missing)
    with ZMQClient(missing) as client:
        client.call('echo')
        [connection] = client._idle.get()
        process.stop()
        process.join()
        connection._used = 0

        def is_missing_for_long():
            connection.is_alive()
            return connection.missing > client.connect_timeout

        wait_until(is_missing_for_long)
        start_time = time.monotonic()
        fail(client)
        assert time.monotonic() - start_time < client.connect_timeout
        fail(client, KNOWN)
        assert len(attempts) == 2


def test_first_start(start, missing, attempts):
    """Before a service was ever there, one call waits for it; others fail at once."""
    with ZMQClient(missing, connect_timeout=TIMEOUT) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.call, 'echo', 1)
        wait_until(lambda: client._breaker.get()._trial)
        for _number in range(5):
            fail(client, 'one call waits for it, and others fail at once')
        assert len(attempts) == 1
        start(missing)
        assert call.result() == 1
        assert client.call('echo', 2) == 2


def test_first_calls_to_a_silent_server(attempts):
    """One of many threads waits for its whole time; others have failed when that ends."""
    with (
        raw_server(lambda connection: None) as address,
        ZMQClient(address, timeout=60, connect_timeout=4) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        calls = [pool.submit(fail, client) for _ in range(8)]
        wait_until(lambda: sum(call.done() for call in calls) == 7)
        assert not client._breaker.get().is_open
        fail(client, 'one call waits for it, and others fail at once')
        assert sum(' for 4 s;' in call.result() for call in calls) == 1
        assert len(attempts) == 8


def test_first_start_of_an_expected_service(start, missing):
    with ZMQClient(missing, connect_timeout=TIMEOUT) as client, ThreadPoolExecutor(4) as pool:
        client.is_service_expected = True
        calls = [pool.submit(client.call, 'echo', number) for number in range(4)]
        wait_until(lambda: client._breaker.get()._noticed_at > 0)
        start(missing)
        assert [call.result() for call in calls] == [*range(4)]


@pytest.mark.parametrize('client', [call, call_async])
def test_port_is_opened_and_the_server_is_silent(client, monkeypatch):
    """The call waits for its whole time, and its error says what was there at last."""
    refused, refuse = threading.Event(), Attempt.refuse
    monkeypatch.setattr(Attempt, 'refuse', lambda *args: refused.set() or refuse(*args))
    with sockets.socket() as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{listener.getsockname()[1]}'
        result = pool.submit(client, address, 60, connect_timeout=1)
        assert refused.wait(TIMEOUT)
        listener.listen()
        with pytest.raises(ZMQUnreachableError, match=' for 1 s; connections are accepted'):
            result.result()


def test_refusal_is_not_down(start, missing):
    """The service is there; the next call learns the same."""
    with ZMQClient(missing, connect_timeout=0.1) as client:
        fail(client)
        start(missing, auth='user:password')
        client.connect_timeout = TIMEOUT
        move_on(client)
        for _number in range(2):
            with pytest.raises(ConnectionRefusedError):
                client.call('echo')


def test_no_connection_can_be_opened(missing, monkeypatch):
    """The attempt is over: the next call tries."""

    def fail_to_open(*args, **options):
        raise OSError('no descriptor')

    with ZMQClient(missing, connect_timeout=0.1) as client:
        fail(client)
        move_on(client)
        with monkeypatch.context() as patch:
            patch.setattr(call_module, 'open_connection', fail_to_open)
            with pytest.raises(OSError, match='no descriptor'):
                client.call('echo')
        fail(client, r' for 0\.\d+ s$')


def test_retries_wait(start, missing):
    """So that a service which starts meanwhile is found."""
    with ZMQClient(missing, connect_timeout=0.1) as client, ThreadPoolExecutor(1) as pool:
        fail(client)
        call = pool.submit(client.call, 'echo', 1, retries=100)
        start(missing)
        assert call.result() == 1


def test_fork(missing):
    """It knows nothing of what its parent knows."""
    with ZMQClient(missing, connect_timeout=0.1) as client:
        fail(client)
        stop_clock(client)
        fail(client, KNOWN)
        assert in_fork(lambda: fail(client, ' s$')) == 0
        fail(client, KNOWN)


def test_forks_while_the_lock_is_held(missing):
    with ZMQClient(missing, connect_timeout=0.1) as client:
        fail(client)
        with client._breaker.get()._lock:
            assert in_fork(lambda: fail(client, ' s$')) == 0


# Messages without waiting for the reply


def test_messages_do_not_wait_again(missing):
    """The thread that sends goes on trying, so each later transaction knows at once."""
    with ZMQClient(missing) as client:
        send_on_commit(client, 'note', timeout=0.2)
        with pytest.raises(ZMQUnreachableError):
            transaction.commit()
        transaction.abort()
        start = time.monotonic()
        for _number in range(20):
            send_on_commit(client, 'note', timeout=0.2)
            with pytest.raises(ZMQUnreachableError):
                transaction.commit()
            transaction.abort()
            with pytest.raises(ZMQUnreachableError):
                client.reserve('note', b'["note"]', timeout=0.2)
        assert time.monotonic() - start < 20 * 0.2


def test_prepare_waits_each_time(missing):
    """It is for programs that wait for a service."""
    with ZMQClient(missing) as client:
        start = time.monotonic()
        for _number in range(3):
            with pytest.raises(ZMQUnreachableError):
                client.prepare(timeout=0.1)
        assert time.monotonic() - start >= 0.3


def test_messages_wait_for_a_restart(start, missing):
    process = start(missing)
    with ZMQClient(missing) as client, ThreadPoolExecutor(1) as pool:
        client.send('echo')
        queue = client._queue.get()
        wait_until(lambda: not len(queue))
        process.stop()
        process.join()
        wait_until(lambda: not queue.is_connected)
        reservation = pool.submit(client.reserve, 'echo', b'["echo"]', timeout=TIMEOUT)
        start(missing)
        reservation.result().post()
        wait_until(lambda: not len(queue))


def test_messages_are_refused_again(start, missing):
    """A service that refuses is not missing, also if messages have waited for it for long."""
    process = start(missing, auth='user:password')
    with ZMQClient(missing) as client:
        client.post('echo', b'["echo"]')
        for _number in range(3):
            with pytest.raises(ZMQRefusedError):
                client.reserve('echo', b'["echo"]', timeout=TIMEOUT)
            assert client._queue.get().missing_since == inf
        process.stop()
        process.join()
        start(missing)
        client.prepare(timeout=TIMEOUT)
        wait_until(lambda: not len(client._queue.get()))


def test_open_breaker_does_not_fail_messages(start, missing):
    """They have a connection of their own."""
    with ZMQClient(missing, connect_timeout=0.1) as client:
        fail(client)
        start(missing)
        client.prepare(timeout=TIMEOUT)
        client.send('echo')
        wait_until(lambda: not len(client._queue.get()))


# asyncio


async def afail(client, match='No service has answered', **options):
    with pytest.raises(ZMQUnreachableError, match=match) as raised:
        await client.call('echo', 1, **options)
    return str(raised.value)


def test_async_calls_fail_at_once(dead):
    async def main():
        async with AsyncZMQClient(dead, timeout=60, connect_timeout=0.2) as client:
            first = await afail(client)
            stop_clock(client)
            texts = await asyncio.gather(*[afail(client, KNOWN) for _ in range(20)])
            assert all(text.startswith(first) for text in texts)
            [connection] = client._connections.get()
            assert (connection._attempts, connection._unsent) == ({}, {})

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < AT_ONCE


def test_async_calls_that_wait_end_together(missing):
    """The service has been missing for the time of the first one."""

    async def main():
        async with AsyncZMQClient(missing, connect_timeout=1) as client:
            first = asyncio.ensure_future(afail(client))
            await until(lambda: client._breaker.get()._noticed_at > 0)
            await asyncio.wait([first], timeout=0.5)
            start = time.monotonic()
            await asyncio.gather(first, *[afail(client) for _ in range(5)])
            return time.monotonic() - start

    assert asyncio.run(main()) < 0.9


def test_async_half_open(missing):
    async def main():
        async with AsyncZMQClient(missing, connect_timeout=0.2) as client:
            await afail(client)
            client.connect_timeout = 60
            move_on(client)
            texts = await asyncio.gather(*[afail(client) for _ in range(8)])
            assert sum('is known to be down' in text for text in texts) >= 7

    asyncio.run(main())


def test_async_recovery(start, missing):
    """The connection finds the service by itself, without a call that tries."""

    async def main():
        async with AsyncZMQClient(missing, connect_timeout=0.1) as client:
            await afail(client)
            await asyncio.get_running_loop().run_in_executor(None, start, missing)
            [connection] = client._connections.get()
            await until(lambda: connection._state.is_connected)
            return await asyncio.gather(*[client.call('echo', number) for number in range(5)])

    assert asyncio.run(main()) == [*range(5)]


def test_async_restart_after_a_recovery(start, missing):
    """The connection that finds the service by itself closes the breaker, for the next restart."""

    async def main():
        async with AsyncZMQClient(missing, connect_timeout=0.1) as client:
            await afail(client)
            run = asyncio.get_running_loop().run_in_executor
            process = await run(None, start, missing)
            [connection] = client._connections.get()
            await until(lambda: connection._state.is_connected)
            assert not client._breaker.get().is_open
            assert await client.call('echo', 1) == 1
            await run(None, process.stop)
            await run(None, process.join)
            client.connect_timeout = TIMEOUT
            call = asyncio.ensure_future(client.call('echo', 2, retries=1))
            await until(lambda: client._breaker.get()._noticed_at > 0)
            await run(None, start, missing)
            return await call

    assert asyncio.run(main()) == 2


def test_async_first_start(start, missing):
    """Calls that wait hold no thread: all of them wait."""

    async def main():
        async with AsyncZMQClient(missing, connect_timeout=TIMEOUT) as client:
            calls = [asyncio.ensure_future(client.call('echo', number)) for number in range(5)]
            await until(lambda: client._breaker.get()._noticed_at > 0)
            await asyncio.get_running_loop().run_in_executor(None, start, missing)
            return await asyncio.gather(*calls)

    assert asyncio.run(main()) == [*range(5)]


def test_async_retries_wait(start, missing):
    async def main():
        async with AsyncZMQClient(missing, connect_timeout=0.1) as client:
            await afail(client)
            call = asyncio.ensure_future(client.call('echo', 1, retries=100))
            await asyncio.get_running_loop().run_in_executor(None, start, missing)
            return await call

    assert asyncio.run(main()) == 1


def test_async_call_that_is_cancelled(missing):
    """Another one tries instead."""

    async def main():
        with raw_server(lambda connection: None) as address:
            async with AsyncZMQClient(address, connect_timeout=0.1) as client:
                await afail(client)
                move_on(client)
                client.connect_timeout = 60
                call = asyncio.ensure_future(client.call('echo'))
                await until(lambda: client._breaker.get()._trial)
                await afail(client, KNOWN)
                call.cancel()
                await asyncio.wait([call])
                client.connect_timeout = 0.1
                await afail(client, r' for 0\.1 s; connections are accepted')

    asyncio.run(main())
