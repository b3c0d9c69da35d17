# SPDX-License-Identifier: ZPL-2.1
"""A transport that is bound to an ipc endpoint, with many peers."""

import resource
import socket as network
from contextlib import ExitStack

import pytest
import zmq

PROGRAM = """
import asyncio, resource, sys, zmq
from pyams_zmq.aio import ZmqEventLoop, ZmqProtocol, create_zmq_connection

class Echo(ZmqProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def msg_received(self, data):
        self.transport.write(data)

async def main():
    await create_zmq_connection(Echo, zmq.ROUTER, bind=f'ipc://{sys.argv[1]}')
    print('true', flush=True)
    await asyncio.Event().wait()

resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
loop = ZmqEventLoop()
loop.run_until_complete(main())
"""

PEERS = 200


def test_many_peers(run_program, context, tmp_path):
    """libzmq ends a program that has no descriptor for an ipc connection."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2 * PEERS:
        pytest.skip('this user may not open so many files')
    path = f'{tmp_path}/socket'
    program = run_program('-c', PROGRAM, path)
    assert program.read()
    with ExitStack() as stack:
        for _ in range(PEERS):
            peer = stack.enter_context(network.socket(network.AF_UNIX))
            peer.connect(path)
        asker = context.socket(zmq.DEALER)
        asker.connect(f'ipc://{path}')
        asker.send(b'x')
        assert asker.recv() == b'x'
