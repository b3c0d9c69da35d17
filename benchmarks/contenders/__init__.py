# SPDX-License-Identifier: ZPL-2.1
"""The contenders: pairs of a server and a client, their environments and calls in flight."""

from typing import NamedTuple

OURS, PEERS, AIOZMQ, VERSION_2 = ENVIRONMENTS = ('ours', 'peers', 'aiozmq', 'pyams_zmq-2')

FLIGHT = 256
FLIGHT_BYTES = 16 * 1024 * 1024
"""Limit of the bytes in flight; 256 messages of 1 MB would measure the memory"""

BARE = 'bare REQ/REP'
BARE_PIPELINED = 'bare DEALER/ROUTER, 256 in flight'
AIOZMQ_PIPELINED = 'aiozmq.rpc, 256 in flight'
VERSION_2_SOCKETS = 'pyams_zmq 2.0.0, socket per message'
SERIAL = 'ours: bare client, ZMQProcess'
CONCURRENT = 'ours: bare client, concurrency=8, async'
SOCKETS = 'ours: zmq_socket per message'
CLIENT = 'ours: ZMQClient'
ASYNC_PIPELINED = 'ours: AsyncZMQClient, 256 in flight'


class Contender(NamedTuple):
    """A pair of a server and a client.

    :ivar environment: name of the environment with its packages
    :ivar pair: module and class in this package; see :class:`contenders.base.Pair`
    :ivar flight: calls in flight of all clients together; 1 for one of each client
    """

    name: str
    environment: str
    pair: str
    flight: int = 1


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(BARE, OURS, 'bare.ReqRep'),
        Contender(BARE_PIPELINED, OURS, 'bare.DealerRouter', FLIGHT),
        Contender('zmq.asyncio REQ/REP', OURS, 'bare_asyncio.ReqRep'),
        Contender('zmq.asyncio, 256 in flight', OURS, 'bare_asyncio.DealerRouter', FLIGHT),
        Contender('zerorpc', PEERS, 'over_zerorpc.Zerorpc'),
        Contender('RPyC', PEERS, 'over_rpyc.RPyC'),
        Contender('Pyro5', PEERS, 'over_pyro5.Pyro5'),
        Contender('aiozmq.rpc', AIOZMQ, 'over_aiozmq.Rpc'),
        Contender(AIOZMQ_PIPELINED, AIOZMQ, 'over_aiozmq.Rpc', FLIGHT),
        Contender(VERSION_2_SOCKETS, VERSION_2, 'version_2.SocketPerMessage'),
        Contender('pyams_zmq 2.0.0, kept socket', VERSION_2, 'version_2.KeptSocket'),
        Contender(SERIAL, OURS, 'ours.BareClient'),
        Contender('ours: bare client, ZMQProcess on uvloop', OURS, 'ours.OnUvloop'),
        Contender(CONCURRENT, OURS, 'ours.Concurrent'),
        Contender('ours: bare client, pool of 4', OURS, 'ours.Pool'),
        Contender(SOCKETS, OURS, 'ours.SocketPerMessage'),
        Contender('ours: zmq_socket kept', OURS, 'ours.KeptSocket'),
        Contender(CLIENT, OURS, 'ours.Client'),
        Contender('ours: ZMQClient, ZMQProcess on uvloop', OURS, 'ours.ClientOnUvloop'),
        Contender('ours: request.zmq', OURS, 'ours.RequestClient'),
        Contender('ours: AsyncZMQClient', OURS, 'ours.AsyncClient'),
        Contender(ASYNC_PIPELINED, OURS, 'ours.AsyncClient', FLIGHT),
    )
}
