# SPDX-License-Identifier: ZPL-2.1
"""ØMQ sockets as transports and protocols of asyncio."""

from pyams_zmq.aio.address import AwaitableEndpoint
from pyams_zmq.aio.client import AsyncZMQClient
from pyams_zmq.aio.loop import ZmqEventLoop, ZmqEventLoopPolicy, create_zmq_connection
from pyams_zmq.aio.protocol import SocketEvent, ZmqProtocol
from pyams_zmq.aio.transport import ZmqTransport

__all__ = [
    'AsyncZMQClient',
    'AwaitableEndpoint',
    'SocketEvent',
    'ZmqEventLoop',
    'ZmqEventLoopPolicy',
    'ZmqProtocol',
    'ZmqTransport',
    'create_zmq_connection',
]
