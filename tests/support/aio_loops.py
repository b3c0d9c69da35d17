# SPDX-License-Identifier: ZPL-2.1
"""Runs the tests of pyams_zmq.aio on two kinds of loops, and finds what they leave behind."""

import asyncio
import gc

import pytest
import uvloop
import zmq
from tornado.ioloop import IOLoop

from checks import TIMEOUT, open_fds, wait_until
from pyams_zmq.aio import ZmqEventLoop, ZmqProtocol, create_zmq_connection

LOOPS = ['asyncio', 'uvloop']
"""Loops of all tests; the others are derived from the one of asyncio and have a smoke test each"""

ONE_LOOP = pytest.mark.parametrize('run', ['asyncio'], indirect=True)
"""For tests of arguments only, in which the loop makes no difference"""

INPROC = 'inproc://test'
"""An address at which connections and messages arrive at once, while the loop is blocked; the peers
use the context of the transports"""

DEAD = 'tcp://127.0.0.1:9'
"""An address without a service"""

FACTORIES = {
    'asyncio': asyncio.SelectorEventLoop,
    'uvloop': uvloop.new_event_loop,
    'zmq': ZmqEventLoop,
}


class Runner:
    """Runs coroutines on a loop.

    :ivar errors: what the exception handler of the loop was called with
    """

    def __init__(self, kind):
        self.errors = []
        if kind == 'tornado':
            self._tornado = IOLoop(make_current=False)
            self.loop = self._tornado.asyncio_loop
        else:
            self._tornado = None
            self.loop = FACTORIES[kind]()
        self.loop.set_exception_handler(lambda _loop, context: self.errors.append(context))

    def __call__(self, coroutine):
        async def limited():
            return await asyncio.wait_for(coroutine, 2 * TIMEOUT)

        if self._tornado is None:
            return self.loop.run_until_complete(limited())
        return self._tornado.run_sync(limited)

    def close_after_use(self):
        self(asyncio.sleep(0))  # takes no time: any coroutine will do
        self.close()

    def close(self):
        (self._tornado or self.loop).close()


@pytest.fixture(params=LOOPS)
def run(request):
    """Run coroutines on each kind of loop; fail if the exception handler of the loop is called."""
    gc.collect()
    if request.param == 'uvloop':  # its first loop opens a pipe which all loops share
        Runner(request.param).close_after_use()
    zmq.Context.instance().destroy(0)  # examples of the documentation leave it open
    before = open_fds()
    runner = Runner(request.param)
    yield runner
    runner.close()
    left = [item for item in gc.get_objects() if isinstance(item, zmq.Socket) and not item.closed]
    left = [socket for socket in left if socket.context is zmq.Context.instance()]
    zmq.Context.instance().destroy(0)
    assert left == []
    del left
    wait_until(lambda: open_fds() <= before)
    assert [context['message'] for context in runner.errors] == []


class Peers:
    """Opens plain sockets as peers, and closes them."""

    def __init__(self):
        self._context = zmq.Context()
        self._context.linger = 0
        self._sockets = []

    def socket(self, zmq_type):
        socket = self._context.socket(zmq_type)
        socket.rcvtimeo = 5000
        self._sockets.append(socket)
        return socket

    def close(self):
        for socket in self._sockets:
            socket.close(0)
        self._context.term()


@pytest.fixture
def context():
    """Context of the peers."""
    peers = Peers()
    yield peers
    peers.close()


class Recorder(ZmqProtocol):
    """Records the calls of its methods.

    :param react: called with the transport and a message, after the message is recorded
    """

    def __init__(self, react=lambda transport, data: None):
        self.react = react
        self.calls = []
        self.messages = []
        self.events = []
        self.transport = None

    def connection_made(self, transport):
        self.calls.append('made')
        self.transport = transport

    def connection_lost(self, exc):
        self.calls.append('lost' if exc is None else exc.errno)

    def pause_writing(self):
        self.calls.append('pause')

    def resume_writing(self):
        self.calls.append('resume')

    def msg_received(self, data):
        self.messages.append(data)
        self.react(self.transport, data)

    def event_received(self, event):
        self.events.append(event)


def os_error(number):
    """Expect an OSError with this errno."""
    return pytest.raises(OSError, match=rf'^\[Errno {int(number)}\]')


async def end(*transports):
    """Abort transports and wait for their end."""
    for transport in transports:
        transport.abort()
    for _ in range(2):  # takes no time: the loop calls connection_lost in its next iteration
        await asyncio.sleep(0)


async def make(zmq_type, factory=Recorder, **kwargs):
    """Make a transport, which is bound to a free port by default."""
    if not kwargs:
        kwargs['bind'] = 'tcp://127.0.0.1:*'
    return await create_zmq_connection(factory, zmq_type, **kwargs)


async def make_unconnected(high=None, low=None):
    """Make a PUSH transport without a peer, which buffers what it sends."""
    transport, protocol = await make(zmq.PUSH)
    transport.set_write_buffer_limits(high, low)
    return transport, protocol


def address_of(transport):
    """Return the only address that a transport is bound to."""
    [address] = transport.listeners()
    return address


def plain(context, zmq_type, connect):
    """Open a plain socket and connect it."""
    socket = context.socket(zmq_type)
    socket.connect(connect)
    return socket
