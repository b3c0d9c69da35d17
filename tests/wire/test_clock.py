# SPDX-License-Identifier: ZPL-2.1
"""Waits that end while the time of a program is frozen, and processes that were started then."""

import asyncio
import os
import signal
import socket as network
import threading
import time
from functools import partial

import pytest
import transaction
import zmq
from freezegun import freeze_time
from pyramid.registry import Registry

from checks import AT_ONCE, TIMEOUT, wait_until
from devices import check_forwarding, make_device
from handlers import Handler
from pool_handlers import Pool, PoolHandler
from pyams_zmq.aio import AsyncZMQClient, ZmqEventLoop
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.transaction import send_on_commit
from pyams_zmq.device import ProcessDevice, ThreadDevice
from pyams_zmq.exceptions import ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.supervisor import SupervisorProcess
from pyams_zmq.wire.clock import monotonic

WAIT = 0.3


@pytest.fixture(autouse=True)
def _frozen():
    with freeze_time('2012-01-14'):
        before = time.monotonic(), time.time()
        yield
        assert (time.monotonic(), time.time()) == before


@pytest.fixture
def silent():
    """Address of a service that does not reply."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        yield f'127.0.0.1:{socket.bind_to_random_port("tcp://127.0.0.1")}'


@pytest.fixture
def dead():
    """Address of a host where nothing accepts the connection."""
    with network.create_server(('127.0.0.1', 0), backlog=1) as listener:
        yield f'127.0.0.1:{listener.getsockname()[1]}'


class Timer:
    """Checks that the block ends after some seconds."""

    def __init__(self, seconds=WAIT):
        self._seconds = seconds

    def __enter__(self):
        self._begin = monotonic()

    def __exit__(self, *exc_info):
        assert self._seconds * 0.9 < monotonic() - self._begin < self._seconds + AT_ONCE


def test_response(silent):
    socket = zmq_socket(silent)
    socket.send_json(['echo', 1])
    with Timer():
        assert zmq_response(socket, timeout=WAIT)[0] == 503
    socket.close()


def test_calls(silent, dead):
    with ZMQClient(silent) as client, Timer(), pytest.raises(ZMQTimeoutError):
        client.call('echo', 1, timeout=WAIT)
    with ZMQClient(dead) as client, Timer(), pytest.raises(ZMQUnreachableError):
        client.call('echo', 1, timeout=WAIT)


def test_posts(dead):
    """The thread that sends messages waits for the connection, and so does a commit."""
    with ZMQClient(dead, timeout=WAIT) as client:
        with Timer(), pytest.raises(ZMQUnreachableError):
            client.send('echo', 1)
        with Timer(), pytest.raises(ZMQUnreachableError):
            client.prepare(timeout=WAIT)
        send_on_commit(client, 'echo', 1)
        with pytest.raises(ZMQUnreachableError):
            transaction.commit()
        transaction.abort()


def test_async_client(silent, dead):
    async def call():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0.01)  # what is tested: it ends
        for address, error in ((silent, ZMQTimeoutError), (dead, ZMQUnreachableError)):
            async with AsyncZMQClient(address) as client:
                with Timer(), pytest.raises(error):
                    await client.call('echo', 1, timeout=WAIT)
        called = asyncio.Event()
        with Timer():
            loop.call_later(WAIT, called.set)
            await called.wait()

    loop = ZmqEventLoop()
    try:
        loop.run_until_complete(call())
    finally:
        loop.close()


class SlowHandler(Handler):
    """Has methods with a time limit."""

    @zmq_method(timeout=WAIT)
    async def slow(self, seconds):
        await asyncio.sleep(seconds)  # longer than the time limit, which is tested
        return [200, seconds]

    @zmq_method(timeout=WAIT)
    def slow_thread(self, args):
        self.event = threading.Event()
        self.event.wait(TIMEOUT)

    def time(self, args):
        return [200, time.time()]

    async def wait(self, seconds):
        loop = asyncio.get_running_loop()
        # What is tested: timers of the loop end.
        await asyncio.wait_for(asyncio.sleep(seconds), 2 * seconds)
        ended = asyncio.Event()
        self.process.loop.call_later(seconds, ended.set)
        await ended.wait()
        return [200, loop.time() > 0]


class SlowMessageHandler(ZMQMessageHandler):
    """Serves SlowHandler."""

    handler = SlowHandler


class SlowProcess(ZMQProcess):
    """Serves SlowHandler."""

    drain_timeout = 3.0

    def __init__(self, address='127.0.0.1'):
        super().__init__(address, SlowMessageHandler, registry=Registry())


def check_limits(process, ask):
    assert ask(process, ['echo', 1]) == [200, 1]
    for name in ('slow', 'slow_thread'):
        with Timer():
            assert ask(process, [name, TIMEOUT])[0] == 504


def test_process(start, ask):
    process = start(factory=SlowProcess)
    now = time.time()
    assert ask(process, ['time', None]) == [200, now]  # it is frozen there, too
    with Timer(2 * WAIT):
        assert ask(process, ['wait', WAIT]) == [200, True]
    check_limits(process, ask)
    process.stop()
    assert process.exitcode == 0


class HangingProcess(SlowProcess):
    """Is never ready, and does not end by itself."""

    def init_stream(self):
        threading.Event().wait()


def test_process_that_hangs():
    process = HangingProcess()
    process.drain_timeout = WAIT
    process.start()
    with Timer(), pytest.raises(ZMQTimeoutError):
        process.wait_ready(WAIT)
    with Timer(WAIT):
        process.stop()
    assert process.exitcode != 0


def test_supervised_process(address, ask):
    """It is started again after a crash."""
    process = SupervisorProcess({'slow': partial(SlowProcess, address)})
    process.start()
    try:
        _, pid = ask(address, ['pid', None])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: ask(address, ['pid', None])[1] != pid)
        check_limits(address, ask)
    finally:
        process.stop()
    assert process.exitcode == 0


class SlowPoolHandler(PoolHandler, SlowHandler):
    """Has the methods of both."""


class SlowPoolMessageHandler(ZMQMessageHandler):
    """Serves SlowPoolHandler."""

    handler = SlowPoolHandler


def test_pool(start, ask):
    pool = start(handler=SlowPoolMessageHandler, factory=Pool)
    check_limits(pool, ask)
    pool.stop()
    assert pool.exitcode == 0


@pytest.mark.parametrize('factory', [ThreadDevice, ProcessDevice])
def test_device(factory):
    with zmq.Context() as context:
        sockets = []

        def peer(kind, address):
            sockets.append(socket := context.socket(kind))
            socket.linger = 0
            if kind == zmq.SUB:
                socket.subscribe(b'')
            socket.connect(address)
            return socket

        device = make_device(factory, zmq.FORWARDER, zmq.SUB, zmq.PUB)
        device.setsockopt_in(zmq.SUBSCRIBE, b'')
        device.start()
        check_forwarding(device, peer)
        with Timer(0):
            device.stop()
        for socket in sockets:
            socket.close()
