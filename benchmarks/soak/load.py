# SPDX-License-Identifier: ZPL-2.1
"""The client program of a soak: calls and messages of all kinds to all services, in threads.

It writes one line for each call or message to its record: when it began, what it was, its token,
how it ended, and how many seconds that took. It runs until a line or the end comes in on its
standard input, then it waits for the end of the input, so that its messages can still be sent.
"""

import asyncio
import faulthandler
import logging
import os
import random
import signal
import sys
import threading
from contextlib import contextmanager
from hashlib import sha256
from itertools import count
from pathlib import Path
from time import monotonic, sleep, time

import transaction
import zmq

from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQRemoteError, ZMQTimeoutError, ZMQUnreachableError
from pyams_zmq.message import decode_reply, encode
from pyams_zmq.transaction import send_on_commit
from soak.services import LATE, LOG_FORMAT

LOGGER = logging.getLogger('soak')

CALL_TIMEOUT = 5.0
"""Seconds of a call"""

SEND_TIMEOUT = 20.0
"""Seconds after which a message that has no reply is given up"""

BIG = 1024 * 1024
"""Characters of a big message or reply"""

RARE = 0.02
"""Part of the messages that are big, and of the transactions that have many messages"""

ABORTED = 0.1
"""Part of the transactions that are aborted"""

ASYNC_CALLS = 4
"""Coroutines that call a service at the same time"""

_ENDS = {ZMQTimeoutError: 'timeout', ZMQUnreachableError: 'unreachable', zmq.Again: 'timeout'}


class AbortedError(Exception):
    """A transaction that the program aborts itself."""


class Call:
    """A call or message under way.

    :ivar end: how it ended: `ok`, `accepted`, a status, `timeout`, `unreachable`, `refused`,
        `aborted`, or `wrong:` and the reason
    """

    end = 'wrong:no-end'

    def check(self, reply, *expected):
        """Compare a reply with what this call must get."""
        self.end = 'ok' if list(reply) == list(expected) else 'wrong:reply'


class Load:
    """Calls and messages, until `stop`.

    :param name: first part of all tokens
    :param record: path of the record
    :param routes: address of each service
    :param seed: start of the random numbers
    :param pause: mean seconds between two calls of a thread
    """

    def __init__(self, name, record, routes, seed, pause):
        self.name = name
        self.routes = routes
        self.pause = pause
        self._record = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._seed = seed
        self._stop = threading.Event()
        kinds = (self._call, self._send, self._commit, self._ask, self._call_async)
        self._threads = [
            threading.Thread(target=kind, args=(route,), name=f'{kind.__name__[1:]}-{route}')
            for route in routes
            for kind in kinds
        ]

    def start(self):
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self):
        """End the threads, each after its call."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _turns(self, stream):
        """Return random numbers, and a token of the stream, for each turn; pause between them."""
        rng = random.Random(f'{self._seed} {self.name} {stream}')  # noqa: S311 - repeatable
        for number in count(1):
            if self._stop.wait(rng.expovariate(1 / self.pause)):
                return
            yield rng, f'{self.name}/{stream}/{number}'

    @contextmanager
    def _recorded(self, kind, route, *tokens):
        """Record how a call or messages end."""
        call, begun, start = Call(), time(), monotonic()
        try:
            yield call
        except ZMQRemoteError as error:
            call.end = str(error.status)
        except AbortedError:
            call.end = 'aborted'
        except Exception as error:
            call.end = _ENDS.get(type(error), f'wrong:{type(error).__name__}')
            if call.end.startswith('wrong'):
                LOGGER.exception('%s to %s', kind, route)
        seconds = monotonic() - start
        for token in tokens:
            line = f'{begun:.6f} {kind} {route} {token} {call.end} {seconds:.3f}\n'
            os.write(self._record, line.encode())

    def _choose_text(self, rng):
        return 'x' * (BIG if rng.random() < RARE else 10)

    # Kinds of load

    def _call(self, route):
        with ZMQClient(self.routes[route], timeout=CALL_TIMEOUT) as client:
            for rng, token in self._turns(f'call-{route}'):
                text = self._choose_text(rng)
                kind = rng.choices(('once', 'again', 'late'), (60, 39, 1))[0]
                name = f'{kind}/{token}'
                seconds = LATE * 2 if kind == 'late' else rng.choice((0, 0, 0.002))
                with self._recorded('call', route, name) as call:
                    args = [name, seconds, len(text), text]
                    reply = client.call(kind, args, retries=int(kind == 'again'))
                    call.check(reply, name, text)

    def _send(self, route):
        with ZMQClient(self.routes[route], timeout=SEND_TIMEOUT) as client:
            for rng, token in self._turns(f'send-{route}'):
                name, text = f'once/{token}', self._choose_text(rng)
                with self._recorded('send', route, name) as call:
                    client.send('once', [name, 0, 0, text])
                    call.end = 'accepted'

    def _commit(self, route):
        with ZMQClient(self.routes[route], timeout=SEND_TIMEOUT) as client:
            for rng, token in self._turns(f'commit-{route}'):
                number = 300 if rng.random() < RARE else rng.choice((1, 2, 3))
                tokens = [f'once/{token}.{part}' for part in range(number)]
                manager = transaction.TransactionManager()
                with self._recorded('send', route, *tokens) as call:
                    with manager:
                        for each in tokens:
                            send_on_commit(client, 'once', [each, 0, 0], manager=manager)
                        if rng.random() < ABORTED:
                            raise AbortedError
                    call.end = 'accepted'

    def _ask(self, route):
        """Call with a bare REQ socket and a binary frame."""
        context, socket = zmq.Context.instance(), None
        for rng, token in self._turns(f'ask-{route}'):
            if socket is None:
                socket = context.socket(zmq.REQ)
                socket.linger, socket.rcvtimeo = 1000, int(CALL_TIMEOUT * 1000)
                socket.sndtimeo = socket.rcvtimeo
                socket.connect(self.routes[route])
            name, data = f'once/{token}', rng.randbytes(rng.choice((0, 10, 1000, 100_000)))
            with self._recorded('call', route, name) as call:
                socket.send_multipart([data, encode(['binary', [name]])])
                status, payload = decode_reply(socket.recv())
                if status != 200:  # noqa: PLR2004 - as in HTTP
                    raise ZMQRemoteError(status, payload)
                call.check(payload, name, sha256(data).hexdigest())
            if call.end == 'timeout':  # it cannot send again
                socket.close()
                socket = None
        if socket is not None:
            socket.close()

    def _call_async(self, route):
        asyncio.run(self._call_together(route))

    async def _call_together(self, route):
        async with AsyncZMQClient(self.routes[route], timeout=CALL_TIMEOUT) as client:

            async def call_one(rng, token):
                with self._recorded('call', route, token) as call:
                    seconds = rng.choice((0, 0, 0.002))
                    call.check(await client.call('once', [token, seconds, 1]), token, 'x')

            turns = self._turns(f'async-{route}')
            # The pause of a turn must not stop the loop, which sees the loss of a connection.
            while turn := await asyncio.to_thread(next, turns, None):
                rng, token = turn
                names = [f'once/{token}.{part}' for part in range(rng.randint(1, ASYNC_CALLS))]
                await asyncio.gather(*(call_one(rng, name) for name in names))


def flood(name, address, number):
    """Send messages until this program is killed: those of a full window are under way then."""
    client = ZMQClient(address, timeout=SEND_TIMEOUT)
    for index in range(1, number + 1):
        client.send('once', [f'once/{name}/flood/{index}', 0.002, 0])
    sys.stdout.write('sent\n')
    sys.stdout.flush()
    sleep(600)


def run(name, record, seed, pause, *routes):
    """Run the load until the end of the standard input."""
    load = Load(name, record, dict(route.split('=', 1) for route in routes), seed, float(pause))
    load.start()
    sys.stdin.readline()
    load.stop()
    Path(f'{record}.stopped').touch()
    sys.stdin.read()


if __name__ == '__main__':
    faulthandler.register(signal.SIGUSR1)  # shows where a thread hangs
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    if sys.argv[1] == 'flood':
        flood(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        run(*sys.argv[1:])
