# SPDX-License-Identifier: ZPL-2.1
"""Programs without a free descriptor that use ØMQ for the first time."""

import asyncio
import errno
import multiprocessing
import os
import resource
from contextlib import suppress

import pytest
import zmq

from checks import TIMEOUT
from pyams_zmq.aio import AsyncZMQClient, ZmqProtocol, create_zmq_connection
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import QUEUE, ThreadDevice
from pyams_zmq.exceptions import ZMQStartError, ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.pool import ZMQPool
from pyams_zmq.socket import zmq_socket

FORK = multiprocessing.get_context('fork')
ADDRESS = 'ipc://@pyams_zmq-nobody'


def call():
    with ZMQClient(ADDRESS, timeout=0.05) as client:
        client.call('echo')


def prepare():
    with ZMQClient(ADDRESS) as client:
        client.prepare(timeout=0.05)


def open_a_socket():
    zmq_socket(ADDRESS).close()


def call_async():
    async def main():
        async with AsyncZMQClient(ADDRESS, timeout=0.05) as client:
            await client.call('echo')

    asyncio.run(main())


def start_device():
    device = ThreadDevice(QUEUE, zmq.ROUTER, zmq.DEALER)
    device.bind_in('tcp://127.0.0.1:*')
    device.start()
    device.stop()


def bind_a_transport():
    async def main():
        transport, _protocol = await create_zmq_connection(
            ZmqProtocol, zmq.ROUTER, bind='tcp://127.0.0.1:*'
        )
        transport.close()

    asyncio.run(main())


def read_statistics():
    pool = ZMQPool('127.0.0.1', None)
    pool.bound_addresses = ['', ADDRESS]
    pool.stats(timeout=0.05)


def starve(function, free):
    """Call a function while few descriptors are free; libzmq may abort this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + free, before[1]))
    try:
        with suppress(ZMQUnreachableError, ZMQStartError, ZMQTimeoutError):
            function()
    except (OSError, zmq.ZMQError) as error:
        if error.errno != errno.EMFILE:
            raise
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


FUNCTIONS = (
    call,
    prepare,
    open_a_socket,
    call_async,
    bind_a_transport,
    start_device,
    read_statistics,
)


@pytest.mark.parametrize('function', FUNCTIONS)
def test_first_use(function):
    for free in range(24):
        child = FORK.Process(target=starve, args=(function, free))
        child.start()
        child.join(TIMEOUT)
        assert child.exitcode == 0, free
