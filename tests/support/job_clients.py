# SPDX-License-Identifier: ZPL-2.1
"""Both clients of a service with the same methods, for tests of what they have in common."""

import asyncio
from contextlib import contextmanager

from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient


class BlockingAsyncClient:
    """An AsyncZMQClient whose methods wait for the result."""

    def __init__(self, loop, client):
        self._loop = loop
        self.client = client

    def __getattr__(self, name):
        method = getattr(self.client, name)
        return lambda *args, **kwargs: self._loop.run_until_complete(method(*args, **kwargs))

    def watch(self, *args, **kwargs):
        """Return an iterator of the jobs; bad arguments raise now."""
        return self._iterate(self.client.watch(*args, **kwargs))

    def _iterate(self, watch):
        while True:
            try:
                yield self._loop.run_until_complete(anext(watch))
            except StopAsyncIteration:
                return


@contextmanager
def blocking_client(kind, address, **options):
    """Make a client of a kind, `threads` or `asyncio`."""
    if kind == 'threads':
        with ZMQClient(address, **options) as client:
            yield client
        return
    loop = asyncio.new_event_loop()
    client = AsyncZMQClient(address, **options)
    try:
        yield BlockingAsyncClient(loop, client)
    finally:
        client.close()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def inner(client):
    """Return the real client."""
    return client.client if isinstance(client, BlockingAsyncClient) else client
