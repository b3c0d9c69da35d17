#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS_zmq.aio package: ØMQ sockets as transports and protocols of asyncio."""

from pyams_zmq.aio.client import AsyncZMQClient
from pyams_zmq.aio.loop import ZmqEventLoop, ZmqEventLoopPolicy, create_zmq_connection
from pyams_zmq.aio.protocol import SocketEvent, ZmqProtocol
from pyams_zmq.aio.transport import ZmqTransport

__docformat__ = 'restructuredtext'

__all__ = [
    'AsyncZMQClient',
    'SocketEvent',
    'ZmqEventLoop',
    'ZmqEventLoopPolicy',
    'ZmqProtocol',
    'ZmqTransport',
    'create_zmq_connection',
]
