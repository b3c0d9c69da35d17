# SPDX-License-Identifier: ZPL-2.1
"""aiozmq.rpc: msgpack over DEALER and ROUTER, on asyncio."""

import asyncio

import aiozmq.rpc

from contenders.base import ANY_PORT, TIMEOUT, AsyncPair


class Handler(aiozmq.rpc.AttrHandler):
    """Handler of the server."""

    @aiozmq.rpc.method
    def echo(self, args):
        """Return the arguments."""
        return [200, args]


class Rpc(AsyncPair):
    """Its server and its client, as its documentation shows them."""

    async def serve_async(self, tell):
        """Serve the methods of a handler."""
        server = await aiozmq.rpc.serve_rpc(Handler(), bind=ANY_PORT)
        [address] = server.transport.bindings()
        tell(address)
        await asyncio.Event().wait()

    async def connect_async(self, address):
        """Return a call of a client."""
        client = await aiozmq.rpc.connect_rpc(connect=address, timeout=TIMEOUT)
        return client.call.echo
