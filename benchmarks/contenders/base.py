# SPDX-License-Identifier: ZPL-2.1
"""Base classes of the pairs: the message, the check of the reply, and the clock."""

import asyncio
import json
from functools import partial
from time import perf_counter

ANY_PORT = 'tcp://127.0.0.1:*'
KIND = 'echo'
ARGS = {'path': '/this/is/my/path', 'format': 'JPEG'}
SMALL = 60
"""Approximate size of that message in bytes"""

TIMEOUT = 20
"""Time limit of a call, in seconds"""


class Echo:
    """Handler for servers that call methods."""

    def echo(self, args):
        """Return the arguments."""
        return [200, args]


def make_args(size):
    """Return arguments for a message of *size* bytes of JSON; above 60 bytes a field is padded."""
    if size <= SMALL:
        return ARGS
    return {**ARGS, 'path': ARGS['path'] + 'x' * (size - len(json.dumps([KIND, ARGS])))}


def answer(request):
    """Answer a message with the standard library only."""
    _kind, args = json.loads(request)
    return json.dumps([200, args]).encode()


def check(reply, args):
    """Check the content of a reply."""
    status, payload = reply
    if status != 200 or payload != args:  # noqa: PLR2004 - a status
        raise RuntimeError(f'The reply is {str(reply)[:80]!r}')


class Pair:
    """A server, and clients with one call at a time."""

    def serve(self, tell):
        """Serve forever.

        :param tell: function to call with the address when the server is bound
        """
        raise NotImplementedError

    def end(self):
        """Stop processes that would outlive the program of the server."""

    def connect(self, address):
        """Open a connection; return a function of the arguments that returns the reply."""
        raise NotImplementedError

    def open(self, address, args, flight):
        """Open a connection.

        :param flight: calls in flight
        :return: a function that makes calls for some seconds and returns their number and the
            seconds that they took
        """
        return partial(self._call_for, self.connect(address), args)

    @staticmethod
    def _call_for(call, args, seconds):
        count = 0
        start = now = perf_counter()
        while now - start < seconds or not count:
            check(call(args), args)
            count += 1
            now = perf_counter()
        return count, now - start


class AsyncPair(Pair):
    """A pair whose client runs a coroutine for each call in flight."""

    async def serve_async(self, tell):
        """Serve forever in an event loop."""
        raise NotImplementedError

    async def connect_async(self, address):
        """Open a connection; return a coroutine function."""
        raise NotImplementedError

    def serve(self, tell):
        """Serve in an event loop."""
        asyncio.run(self.serve_async(tell))

    def open(self, address, args, flight):
        """Open a connection in an event loop."""
        loop = asyncio.new_event_loop()
        call = loop.run_until_complete(self.connect_async(address))
        return lambda seconds: loop.run_until_complete(
            self._call_together(call, args, seconds, flight)
        )

    @staticmethod
    async def _call_together(call, args, seconds, flight):
        start = perf_counter()

        async def call_for():
            count = 0
            while perf_counter() - start < seconds or not count:
                check(await call(args), args)
                count += 1
            return count

        counts = await asyncio.gather(*[call_for() for _ in range(flight)])
        return sum(counts), perf_counter() - start
