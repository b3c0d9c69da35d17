# SPDX-License-Identifier: ZPL-2.1
"""Hosts that are gone without closing their connections, and links that are only slow."""

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from handlers import RecordingMessageHandler
from peers import Forwarder
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from transaction_checks import notes

NETWORK = ['unshare', '--net', '--map-root-user']
"""Run a program in a network of its own"""


def has_networks():
    return subprocess.run([*NETWORK, 'true'], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not has_networks(), reason='unshare is not allowed here')
@pytest.mark.parametrize(
    'use',
    [
        'client.call("echo", 2)',
        'asyncio.run(call_async())',
        'wait_until(lambda: not client._queue.get().is_connected)',
        'client.post("note", b"""["note", 2]"""), '
        'wait_until(lambda: not client._queue.get().is_connected)',
    ],
)
def test_host_that_is_gone(use):
    """Its network is down: no packet arrives, and none comes back."""
    program = f"""
    import asyncio, fcntl, os, socket, struct
    from time import monotonic
    from checks import wait_until
    from handlers import Process, RecordingMessageHandler
    from pyams_zmq.aio import AsyncZMQClient
    from pyams_zmq.client import ZMQClient
    from pyams_zmq.exceptions import ZMQUnreachableError

    SIOCSIFFLAGS, IFF_UP = 0x8914, 1

    def set_network(flags):
        global end
        end = monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack('16sh', b'lo', flags))

    async def call_async():
        set_network(IFF_UP)
        async with AsyncZMQClient(process.bound_address, timeout=60) as client:
            await client.call('echo', 1)
            set_network(0)
            await client.call('echo', 2)

    for cls in (ZMQClient, AsyncZMQClient):
        cls.heartbeat_interval, cls.heartbeat_timeout = 1, 2
    set_network(IFF_UP)
    process = Process('127.0.0.1', handler=RecordingMessageHandler)
    process.start()
    client = ZMQClient(process.wait_ready(), timeout=60)
    client.call('echo', 1)
    client.send('note', 1)
    wait_until(lambda: not len(client._queue.get()))
    set_network(0)
    try:
        {use}
    except ZMQUnreachableError as error:
        assert 'was lost' in str(error), error
    assert 1 < monotonic() - end < 30
    process.kill()
    process.join()
    """
    subprocess.run(
        [*NETWORK, sys.executable, '-W', 'ignore', '-c', textwrap.dedent(program)],
        check=True,
        timeout=60,
        cwd=Path(__file__).parent.parent / 'support',
        capture_output=True,
    )


def call(address, text):
    with ZMQClient(address, timeout=60) as client:
        return client.call('echo', text)


def call_async(address, text):
    async def main():
        async with AsyncZMQClient(address, timeout=60) as client:
            return await client.call('echo', text)

    return asyncio.run(main())


def send(address, text):
    with ZMQClient(address, timeout=60) as client:
        client.send('note', text)
        return notes(client)[-1]


@pytest.mark.parametrize('client', [call, call_async, send])
def test_slow_link(start, monkeypatch, client):
    """A connection that makes progress is kept, although a message takes longer than the limits."""
    for cls in (ZMQClient, AsyncZMQClient):
        monkeypatch.setattr(cls, 'heartbeat_interval', 1)
        monkeypatch.setattr(cls, 'heartbeat_timeout', 2)  # both less than the 4 s of the message
    text = 'x' * 2 * 1024 * 1024
    host, _, port = start(handler=RecordingMessageHandler).bound_address[6:].partition(':')
    with Forwarder(rate=512 * 1024) as forwarder:
        forwarder.target = (host, int(port))
        assert client(forwarder.address, text) == text
        assert forwarder.forwarded == (2 if client is send else 1)  # `send`, and the call of it
