# SPDX-License-Identifier: ZPL-2.1
"""Calls of the method `echo` with each kind of client."""

import asyncio

import pytest

from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQRefusedError, ZMQUnreachableError
from pyams_zmq.socket import zmq_response, zmq_socket


def call(address, timeout, **options):
    options.setdefault('connect_timeout', timeout)
    with ZMQClient(address, timeout=timeout, **options) as client:
        return client.call('echo', 1)


def call_async(address, timeout, **options):
    options.setdefault('connect_timeout', timeout)

    async def main():
        async with AsyncZMQClient(address, timeout=timeout, **options) as client:
            return await client.call('echo', 1)

    return asyncio.run(main())


def prepare(address, timeout, **options):
    with ZMQClient(address, **options) as client:
        client.prepare(timeout=timeout)
    return 1


def ask(address, timeout, **options):
    with zmq_socket(address, **options) as socket:
        socket.send_json(['echo', 1])
        status, payload = zmq_response(socket, timeout=timeout)
    if status == 503:
        raise ZMQUnreachableError(payload)
    if status == 401:
        raise ZMQRefusedError(payload)
    return payload


CLIENTS = pytest.mark.parametrize('client', [call, call_async, prepare, ask])
