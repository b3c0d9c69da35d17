# SPDX-License-Identifier: ZPL-2.1
"""Transport of pyams_zmq.aio, on every loop: what is sent comes in, and nothing is left behind."""

import array
import asyncio
import errno
import gc
import threading
import time
from contextlib import suppress
from ipaddress import ip_address

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from aio_loops import Recorder, address_of, context, end, make, os_error, plain, run, until
from checks import open_fds, wait_until
from pyams_zmq.aio import SocketEvent
from pyams_zmq.aio.address import check_numeric
from pyams_zmq.aio.pump import GUARD, MOST

__all__ = ['context', 'run']

ARRIVAL = 0.05
"""Seconds in which a message arrives, when nobody may look whether it has"""

DEAD = 'tcp://127.0.0.1:9'
"""Where nobody listens"""


def no_peer(high=None, low=None, factory=Recorder):
    """Make a PUSH transport which has nobody to send to yet, so that it buffers."""

    async def made():
        transport, protocol = await make(zmq.PUSH, factory)
        transport.set_write_buffer_limits(high, low)
        return transport, protocol

    return made()


# Messages


def test_echo(run):
    class Echo(Recorder):
        def msg_received(self, data):
            super().msg_received(data)
            self.transport.write(data)

    async def main():
        server, echo = await make(zmq.ROUTER, Echo)
        client, protocol = await make(zmq.DEALER, connect=address_of(server))
        assert protocol.calls == echo.calls == ['made']
        client.write([b''])
        client.write((b'1', b'', b'x' * 1_000_000))
        await until(lambda: len(protocol.messages) == 2)
        assert protocol.messages == [(b'',), (b'1', b'', b'x' * 1_000_000)]
        assert all(type(part) is bytes for message in echo.messages for part in message)
        await end(client, server)
        assert protocol.calls == echo.calls == ['made', 'lost']

    run(main())


def test_buffer_copies_what_can_change(run, context):
    async def main():
        transport, _protocol = await no_peer()
        changing = bytearray(b'one')
        numbers = array.array('I', [1, 2])
        view = memoryview(b'a-b-c')[::2]
        transport.write([changing, memoryview(changing), numbers, view])
        transport.write(part for part in (changing, b'three'))
        changing[:] = b'two'
        numbers[0] = 3
        assert transport.get_write_buffer_size() == 3 + 3 + 8 + 3 + 3 + 5
        peer = plain(context, zmq.PULL, address_of(transport))
        await until(lambda: transport.get_write_buffer_size() == 0)
        one_two = array.array('I', [1, 2]).tobytes()
        assert peer.recv_multipart() == [b'one', b'one', one_two, b'abc']
        assert peer.recv_multipart() == [b'one', b'three']
        await end(transport)

    run(main())


def test_sent_at_once(run, context):
    async def main():
        transport, _protocol = await no_peer()
        peer = plain(context, zmq.PULL, address_of(transport))
        transport.write([b'first'])
        await until(lambda: transport.get_write_buffer_size() == 0)
        transport.write([bytearray(b'now'), b'!'])
        assert transport.get_write_buffer_size() == 0
        assert peer.recv_multipart() == [b'first']
        assert peer.recv_multipart() == [b'now', b'!']  # though the loop did not run
        await end(transport)

    run(main())


@pytest.mark.parametrize('data', [b'ab', bytearray(b'ab'), memoryview(b'ab'), 'ab', 1, None])
def test_no_message(run, data):
    async def main():
        transport, _protocol = await no_peer()
        with pytest.raises(TypeError):
            transport.write(data)
        await end(transport)

    run(main())


@pytest.mark.parametrize('part', ['text', 1, None, [b'']])
def test_no_frame(run, part):
    async def main():
        transport, _protocol = await no_peer()
        with pytest.raises(TypeError):
            transport.write([b'frame', part])
        transport.write([])
        transport.write(part for part in ())
        assert '0 messages (0 bytes)' in repr(transport)
        await end(transport)

    run(main())


def test_many_messages(run, context):
    async def main():
        transport, protocol = await make(zmq.PULL)
        transport.setsockopt(zmq.RCVHWM, 0)
        transport.unbind(address_of(transport))
        peer = context.socket(zmq.PUSH)
        peer.sndhwm = 0
        peer.connect(transport.bind('tcp://127.0.0.1:*'))
        transport.pause_reading()
        for _number in range(100_000):
            peer.send(b'x')
        turns = 0
        transport.resume_reading()
        while len(protocol.messages) < 100_000:
            before = len(protocol.messages)
            await asyncio.sleep(0)
            assert len(protocol.messages) - before <= 2 * (MOST + 1)
            turns += 1
        assert turns > 100
        await end(transport)

    run(main())


def test_slow_protocol_and_full_buffer(run, context):
    class Slow(Recorder):
        def msg_received(self, data):
            super().msg_received(data)
            time.sleep(0.006)  # longer than a turn

    async def main():
        transport, protocol = await make(zmq.PAIR, Slow)
        for number in range(20):
            transport.write([b'%d' % number])
        assert transport.get_write_buffer_size()
        peer = plain(context, zmq.PAIR, address_of(transport))
        for _number in range(20):
            peer.send(b'x')
        await until(lambda: len(protocol.messages) == 20)
        assert transport.get_write_buffer_size() == 0  # neither waited for the other
        await end(transport)

    run(main())


# Limits


def test_limits(run, context):
    async def main():
        transport, protocol = await no_peer(high=10, low=4)
        assert transport.get_write_buffer_limits() == (4, 10)
        transport.write([b'12345', b'12345'])
        assert protocol.calls == ['made']  # equal is not above
        transport.write([b'1'])
        assert protocol.calls == ['made', 'pause']  # within the call
        transport.write([b'1' * 100])
        peer = plain(context, zmq.PULL, address_of(transport))
        await until(lambda: 'resume' in protocol.calls)
        assert protocol.calls == ['made', 'pause', 'resume']
        assert [peer.recv_multipart() for _number in range(3)][1] == [b'1']
        await end(transport)
        assert protocol.calls == ['made', 'pause', 'resume', 'lost']

    run(main())


def test_resumed_at_the_low_limit(run):
    async def main():
        transport, protocol = await no_peer(high=10, low=4)
        transport.write([b'1' * 11])
        transport.set_write_buffer_limits(high=20, low=10)
        assert protocol.calls == ['made', 'pause']
        transport.set_write_buffer_limits(high=20, low=11)
        assert protocol.calls == ['made', 'pause', 'resume']
        transport.set_write_buffer_limits(high=0)
        assert transport.get_write_buffer_limits() == (0, 0)
        assert protocol.calls == ['made', 'pause', 'resume', 'pause']
        await end(transport)
        assert protocol.calls == ['made', 'pause', 'resume', 'pause', 'resume', 'lost']

    run(main())


def test_values_of_limits(run):
    async def main():
        transport, _protocol = await no_peer()
        assert transport.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
        transport.set_write_buffer_limits(low=3)
        assert transport.get_write_buffer_limits() == (3, 12)
        transport.set_write_buffer_limits(high=100)
        assert transport.get_write_buffer_limits() == (25, 100)
        for high, low in ((1, 2), (-1, None), (1, -1)):
            with pytest.raises(ValueError, match='must be >= 0'):
                transport.set_write_buffer_limits(high, low)
        assert transport.get_write_buffer_limits() == (25, 100)
        await end(transport)

    run(main())


# End


def test_close_sends_what_is_buffered(run, context):
    async def main():
        transport, protocol = await no_peer(high=1)
        for number in range(3):
            transport.write([b'%d' % number])
        transport.close()
        transport.close()
        assert transport.is_closing()
        assert 'PUSH, closing, not reading, 3 messages (3 bytes)' in repr(transport)
        transport.write([b'too late'])
        await asyncio.sleep(0)
        assert protocol.calls == ['made', 'pause']
        peer = plain(context, zmq.PULL, address_of(transport))
        await until(lambda: 'lost' in protocol.calls)
        assert protocol.calls == ['made', 'pause', 'resume', 'lost']
        assert [peer.recv() for _number in range(3)] == [b'0', b'1', b'2']
        assert not peer.poll(10)  # milliseconds, for what must not come
        assert transport.get_extra_info('zmq_socket').closed

    run(main())


def test_close_lingers(run, context):
    """What the socket has taken is sent, though the transport is closed right after it."""

    async def main():
        peer = context.socket(zmq.PULL)
        port = peer.bind_to_random_port('tcp://127.0.0.1')
        transport, protocol = await make(zmq.PUSH, connect=f'tcp://127.0.0.1:{port}')
        transport.write([b'message'])
        transport.close()
        await until(lambda: protocol.calls == ['made', 'lost'])
        assert peer.recv() == b'message'

    run(main())


def test_no_message_after_close(run, context):
    class Closer(Recorder):
        def msg_received(self, data):
            super().msg_received(data)
            self.transport.close()

    async def main():
        transport, protocol = await make(zmq.PULL, Closer)
        peer = plain(context, zmq.PUSH, address_of(transport))
        transport.pause_reading()
        for _number in range(10):
            peer.send(b'x')
        transport.resume_reading()
        await until(lambda: 'lost' in protocol.calls)
        await asyncio.sleep(GUARD)  # for what must not come
        assert len(protocol.messages) == 1
        assert protocol.calls == ['made', 'lost']

    run(main())


@pytest.mark.parametrize('first', ['nothing', 'close'])
def test_abort_drops(run, first):
    async def main():
        with zmq.Context() as own:
            sock = own.socket(zmq.PUSH)
            sock.sndhwm = 2
            sock.connect(DEAD)
            transport, protocol = await make(zmq.PUSH, zmq_sock=sock)
            transport.set_write_buffer_limits(high=0)
            while not transport.get_write_buffer_size():
                transport.write([b'x'])
            if first == 'close':
                transport.close()
            transport.abort()
            transport.abort()
            assert transport.get_write_buffer_size() == 0
            assert protocol.calls == ['made', 'pause']
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert protocol.calls == ['made', 'pause', 'resume', 'lost']
        # The context has ended, though nobody took the messages.

    run(main())


def test_abort_after_close(run):
    async def main():
        with zmq.Context() as own:
            sock = own.socket(zmq.PUSH)
            sock.connect(DEAD)
            transport, protocol = await make(zmq.PUSH, zmq_sock=sock)
            transport.write([b'x'])
            transport.close()
            transport.abort()
            await asyncio.sleep(0)
            assert protocol.calls == ['made', 'lost']

    run(main())


def test_close_while_paused(run, context):
    async def main():
        transport, protocol = await make(zmq.PULL)
        fd = transport._pump._fd
        peer = plain(context, zmq.PUSH, address_of(transport))
        transport.pause_reading()
        transport.pause_reading()
        assert not transport.is_reading()
        peer.send(b'x')
        await asyncio.sleep(2 * GUARD)  # for what must not come
        assert protocol.messages == []
        transport.close()
        transport.pause_reading()
        transport.resume_reading()
        assert not transport.is_reading()
        assert not asyncio.get_running_loop().remove_reader(fd)
        await until(lambda: 'lost' in protocol.calls)
        assert protocol.messages == []

    run(main())


def test_pause_within_a_turn(run, context):
    class Pauser(Recorder):
        def msg_received(self, data):
            super().msg_received(data)
            self.transport.pause_reading()

    async def main():
        transport, protocol = await make(zmq.PULL, Pauser)
        peer = plain(context, zmq.PUSH, address_of(transport))
        for number in range(1, 6):
            peer.send(b'x')
            await until(lambda number=number: len(protocol.messages) == number)
            assert not transport.is_reading()
            transport.resume_reading()
            assert transport.is_reading()
        await end(transport)

    run(main())


def test_end_of_the_context(run):
    async def main():
        own = zmq.Context()
        sock = own.socket(zmq.PULL)
        transport, protocol = await make(zmq.PULL, zmq_sock=sock)
        transport.enable_monitor()
        terminator = threading.Thread(target=own.term)  # it waits for the socket
        terminator.start()
        await until(lambda: len(protocol.calls) == 2)
        assert protocol.calls == ['made', zmq.ETERM]
        terminator.join(5)
        assert not terminator.is_alive()

    run(main())


def test_end_of_the_context_after_a_write(run):
    """Libzmq looks for commands in a send now and then only: the look after it may be told."""

    class Ended(zmq.Socket):
        is_ended = False

        def getsockopt(self, option):
            if self.is_ended and option == zmq.EVENTS:
                raise zmq.ZMQError(zmq.ETERM)
            return super().getsockopt(option)

    async def main():
        sock = zmq.Context.instance().socket(zmq.PAIR, socket_class=Ended)
        transport, protocol = await make(zmq.PAIR, zmq_sock=sock)
        await asyncio.sleep(0)  # takes no time: the first look
        sock.is_ended = True
        transport.write([b'x'])
        assert protocol.calls == ['made']
        await until(lambda: len(protocol.calls) == 2)
        assert protocol.calls == ['made', zmq.ETERM]

    run(main())


def test_socket_closed_by_another(run):
    async def main():
        transport, protocol = await make(zmq.PULL)
        transport.get_extra_info('zmq_socket').close(0)
        await until(lambda: len(protocol.calls) == 2)
        assert protocol.calls == ['made', zmq.ENOTSOCK]
        transport, protocol = await no_peer()
        transport.get_extra_info('zmq_socket').close(0)
        transport.write([b'x'])
        transport.write([b'x'])
        await asyncio.sleep(0)
        assert protocol.calls == ['made', zmq.ENOTSOCK]
        transport, protocol = await no_peer()
        transport.write([b'x'])
        transport.get_extra_info('zmq_socket').close(0)
        await until(lambda: len(protocol.calls) == 2)
        assert protocol.calls == ['made', zmq.ENOTSOCK]

    run(main())


def test_socket_closed_while_others_are_told(run, context):
    class Closer(Recorder):
        def msg_received(self, data):
            super().msg_received(data)
            self.transport.get_extra_info('zmq_socket').close(0)

    async def main():
        transport, protocol = await make(zmq.PAIR, Closer)
        transport.write([b'x'])
        peer = plain(context, zmq.PAIR, address_of(transport))
        peer.send(b'x')
        time.sleep(ARRIVAL)  # noqa: ASYNC251 - then it can both receive and send, and receives
        await until(lambda: len(protocol.calls) == 2)
        assert protocol.calls == ['made', zmq.ENOTSOCK]

    run(main())


def test_after_the_end(run):
    async def main():
        transport, protocol = await make(zmq.SUB)
        address = address_of(transport)
        transport.enable_monitor()
        await end(transport)
        assert 'SUB, closed, not reading, 0 messages' in repr(transport)
        for call in (
            lambda: transport.bind(address),
            lambda: transport.unbind(address),
            lambda: transport.connect(address),
            lambda: transport.disconnect(address),
            lambda: transport.getsockopt(zmq.LINGER),
            lambda: transport.setsockopt(zmq.LINGER, 0),
            lambda: transport.subscribe(b''),
            lambda: transport.unsubscribe(b''),
            lambda: transport.setsockopt(zmq.SUBSCRIBE, b''),
            transport.enable_monitor,
        ):
            with os_error(zmq.ENOTSOCK):
                call()
        for call in (
            lambda: transport.write([b'x']),
            lambda: transport.set_write_buffer_limits(1),
            lambda: transport.set_protocol(protocol),
            transport.disable_monitor,
            transport.pause_reading,
            transport.resume_reading,
            transport.close,
            transport.abort,
        ):
            call()
        assert transport.is_closing()
        assert not transport.is_reading()
        assert transport.get_write_buffer_size() == 0
        assert transport.get_protocol() is protocol
        assert transport.get_extra_info('zmq_socket').closed
        for snapshot in (
            transport.listeners,
            transport.bindings,
            transport.connections,
            transport.subscriptions,
        ):
            assert snapshot() == frozenset()
        await asyncio.sleep(0)
        assert protocol.calls == ['made', 'lost']

    run(main())


# Errors of others


@pytest.mark.parametrize('exception', [ValueError, asyncio.CancelledError])
def test_failing_protocol(run, context, exception):
    class Failing(Recorder):
        def connection_made(self, transport):
            super().connection_made(transport)
            raise exception('made')

        def connection_lost(self, exc):
            super().connection_lost(exc)
            raise exception('lost')

        def pause_writing(self):
            super().pause_writing()
            raise exception('pause')

        def resume_writing(self):
            super().resume_writing()
            raise exception('resume')

        def msg_received(self, data):
            super().msg_received(data)
            raise exception('message')

        def event_received(self, event):
            super().event_received(event)
            raise exception('event')

    async def main():
        transport, protocol = await make(zmq.PAIR, Failing)
        transport.set_write_buffer_limits(high=0)
        transport.enable_monitor(zmq.EVENT_ACCEPTED)
        transport.write([b'1'])
        peer = plain(context, zmq.PAIR, address_of(transport))
        peer.send(b'2')
        peer.send(b'3')
        await until(lambda: len(protocol.messages) == 2 and protocol.events)
        await until(lambda: protocol.calls == ['made', 'pause', 'resume'])
        assert peer.recv() == b'1'
        await end(transport)
        assert protocol.calls == ['made', 'pause', 'resume', 'lost']
        told = {str(error['exception']) for error in run.errors}
        assert told == {'made', 'pause', 'resume', 'message', 'event', 'lost'}
        assert all(isinstance(error['exception'], exception) for error in run.errors)
        assert run.errors[0]['transport'] is transport
        assert run.errors[0]['protocol'] is protocol
        run.errors.clear()

    run(main())


def test_interrupted(run, context):
    class Interrupted(Recorder):
        def msg_received(self, data):
            super().msg_received(data)
            if data == (b'interrupt',):
                raise KeyboardInterrupt

    async def begin():
        transport, protocol = await make(zmq.PULL, Interrupted)
        peer = plain(context, zmq.PUSH, address_of(transport))
        transport.pause_reading()
        peer.send(b'interrupt')
        peer.send(b'next')
        return transport, protocol

    async def interrupt():
        transport.resume_reading()
        await asyncio.sleep(5)

    class Leaver(Recorder):
        def connection_lost(self, exc):
            raise SystemExit

    async def leave():
        other, _protocol = await make(zmq.PULL, Leaver)
        await end(other)
        await asyncio.sleep(5)

    def settle():
        for task in asyncio.all_tasks(run.loop):
            task.cancel()
        with suppress(RuntimeError):  # the run that was interrupted ends only now
            run_it(asyncio.sleep(0.01))

    run_it = run.loop.run_until_complete
    transport, protocol = run_it(begin())
    with pytest.raises(KeyboardInterrupt):
        run_it(interrupt())
    settle()
    run_it(until(lambda: len(protocol.messages) == 2))
    run_it(end(transport))
    with pytest.raises(SystemExit):
        run_it(leave())
    settle()


def test_peer_unknown(run, context):
    async def main():
        transport, protocol = await make(zmq.ROUTER)
        transport.setsockopt(zmq.ROUTER_MANDATORY, 1)
        transport.write([b'nobody', b'x'])
        assert [error['exception'].errno for error in run.errors] == [zmq.EHOSTUNREACH]
        peer = plain(context, zmq.DEALER, address_of(transport))
        peer.send(b'hello')
        await until(lambda: protocol.messages)
        transport.write([protocol.messages[0][0], b'x'])
        assert peer.recv() == b'x'
        assert protocol.calls == ['made']
        assert len(run.errors) == 1
        run.errors.clear()
        await end(transport)

    run(main())


@pytest.fixture
def full_router(context):
    """A ROUTER transport with a peer whose queue is full, and another one with room."""

    async def made():
        sock = zmq.Context.instance().socket(zmq.ROUTER)
        sock.router_mandatory = True
        sock.sndhwm = 1
        sock.sndbuf = 4096
        transport, protocol = await make(zmq.ROUTER, zmq_sock=sock)
        address = transport.bind('ipc://*')
        peers = []
        for name in (b'full', b'free'):
            peer = context.socket(zmq.DEALER)
            peer.rcvhwm = 1
            peer.rcvbuf = 4096
            peer.routing_id = name
            peer.connect(address)
            peer.send(b'hello')
            peers.append(peer)
        await until(lambda: len(protocol.messages) == 2)
        sent = 0
        while not transport.get_write_buffer_size():
            while not transport.get_write_buffer_size():
                transport.write([b'full', b'x' * 10_000])
                sent += 1
            await asyncio.sleep(0.05)  # what the I/O threads and the system still take
        return transport, protocol, peers, sent

    return made


def test_one_peer_is_full(run, full_router):
    async def main():
        transport, _protocol, (full, free), sent = await full_router()
        transport.write([b'free', b'behind'])
        started = time.thread_time()
        await asyncio.sleep(0.2)  # for what must not happen
        assert time.thread_time() - started < 0.1  # it does not turn in vain
        assert transport.get_write_buffer_size()

        def read():
            for _number in range(sent):
                full.recv()

        await asyncio.get_running_loop().run_in_executor(None, read)
        await until(lambda: transport.get_write_buffer_size() == 0)
        assert free.recv() == b'behind'
        await end(transport)

    run(main())


def test_peer_leaves_with_messages_in_the_buffer(run, full_router):
    async def main():
        transport, protocol, (full, free), _sent = await full_router()
        transport.write([b'free', b'behind'])
        full.close(0)
        await until(lambda: transport.get_write_buffer_size() == 0)
        assert free.recv() == b'behind'
        assert protocol.calls == ['made']
        assert {error['exception'].errno for error in run.errors} == {zmq.EHOSTUNREACH}
        run.errors.clear()
        await end(transport)

    run(main())


# Sockets that cannot send at any time


def test_requests_wait_for_replies(run, context):
    async def main():
        transport, protocol = await make(zmq.REQ)
        for number in range(3):
            transport.write([b'%d' % number])
        peer = plain(context, zmq.REP, address_of(transport))

        def serve(count):
            for _number in range(count):
                peer.send(peer.recv() + b'!')

        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, serve, 3)
        await until(lambda: len(protocol.messages) == 3)
        assert protocol.messages == [(b'0!',), (b'1!',), (b'2!',)]
        for number in range(3):
            transport.write([b'%d' % number])
        assert transport.get_write_buffer_size()
        transport.close()
        await loop.run_in_executor(None, serve, 3)
        await until(lambda: 'lost' in protocol.calls)
        assert len(protocol.messages) == 3

    run(main())


def test_second_reply(run, context):
    async def main():
        transport, protocol = await make(zmq.REP)
        peer = plain(context, zmq.REQ, address_of(transport))
        other = plain(context, zmq.REQ, address_of(transport))
        peer.send(b'request')
        await until(lambda: protocol.messages)
        other.send(b'other')
        transport.write([b'reply'])
        with os_error(zmq.EFSM):
            transport.write([b'reply of whom?'])
        assert peer.recv() == b'reply'
        await until(lambda: len(protocol.messages) == 2)
        transport.write([b'reply'])
        assert other.recv() == b'reply'
        await end(transport)

    run(main())


def test_socket_that_never_sends(run):
    async def main():
        transport, protocol = await make(zmq.PULL)
        with os_error(errno.EOPNOTSUPP):
            transport.write([b'x'])
        assert protocol.calls == ['made']
        await end(transport)

    run(main())


def test_refused_when_its_turn_comes(run, context):
    class Choosy(zmq.Socket):
        def send(self, data, *args, **kwargs):
            if data == b'bad':
                raise zmq.ZMQError(errno.EMSGSIZE)
            if data == b'worse':
                raise ValueError(data)
            return super().send(data, *args, **kwargs)

    async def main():
        sock = zmq.Context.instance().socket(zmq.PUSH, socket_class=Choosy)
        transport, protocol = await make(zmq.PUSH, zmq_sock=sock)
        transport.write([b'good'])
        transport.write([b'bad'])
        transport.write([b'worse'])
        transport.write([b'too'])
        peer = plain(context, zmq.PULL, transport.bind('tcp://127.0.0.1:*'))
        await until(lambda: transport.get_write_buffer_size() == 0)
        assert [peer.recv(), peer.recv()] == [b'good', b'too']
        assert [type(error['exception']) for error in run.errors] == [OSError, ValueError]
        assert run.errors[0]['exception'].errno == errno.EMSGSIZE
        assert protocol.calls == ['made']
        run.errors.clear()
        with os_error(errno.EMSGSIZE):
            transport.write([b'bad'])
        with pytest.raises(ValueError, match='worse'):
            transport.write([b'worse'])
        await end(transport)

    run(main())


# Wake-ups


def refused_option(transport):
    with os_error(errno.EINVAL):
        transport.getsockopt(9999)


LOOKS = {
    'getsockopt': lambda transport, sock: transport.getsockopt(zmq.EVENTS),
    'no option': lambda transport, sock: refused_option(transport),
    'setsockopt': lambda transport, sock: transport.setsockopt(zmq.LINGER, 0),
    'repr': lambda transport, sock: repr(transport),
    'write': lambda transport, sock: transport.write([b'x']),
    'bind': lambda transport, sock: transport.bind('tcp://127.0.0.1:*'),
    'listeners': lambda transport, sock: transport.listeners(),
    'pause': lambda transport, sock: (transport.pause_reading(), transport.resume_reading()),
    'monitor': lambda transport, sock: transport.enable_monitor(),
    'zmq_socket': lambda transport, sock: sock.getsockopt(zmq.EVENTS),
    'zmq_socket repr': lambda transport, sock: repr(sock),
    'zmq_socket send': lambda transport, sock: sock.send(b'x'),
    'zmq_socket poll': lambda transport, sock: sock.poll(0),
    'zmq_socket later': lambda transport, sock: asyncio.get_running_loop().call_later(
        2 * GUARD, sock.getsockopt, zmq.EVENTS
    ),
}
"""Ways to look at a socket, which may take the wake-up of a message away"""


@pytest.mark.parametrize('way', LOOKS)
def test_wake_up(run, context, way):
    async def main():
        transport, protocol = await make(zmq.PAIR)
        peer = plain(context, zmq.PAIR, address_of(transport))
        sock = None
        if way.startswith('zmq_socket'):
            sock = transport.get_extra_info('zmq_socket')
        peer.send(b'first')
        await until(lambda: len(protocol.messages) == 1)
        for number in range(2, 5):
            peer.send(b'next')
            time.sleep(ARRIVAL)  # noqa: ASYNC251 - it arrives before the loop can see it
            LOOKS[way](transport, sock)
            await until(lambda number=number: len(protocol.messages) == number, timeout=2)
        await end(transport)

    run(main())


def test_wake_up_to_send(run, context):
    """The room that a peer makes is not overlooked either."""

    async def main():
        transport, _protocol = await no_peer()
        transport.write([b'x'])
        peer = plain(context, zmq.PULL, address_of(transport))
        time.sleep(ARRIVAL)  # noqa: ASYNC251 - it connects before the loop can see it
        transport.getsockopt(zmq.EVENTS)
        await until(lambda: transport.get_write_buffer_size() == 0)
        assert peer.recv() == b'x'
        await end(transport)

    run(main())


def test_message_waits_in_a_socket_that_is_handed_over(run, context):
    async def main():
        sock = context.socket(zmq.PULL)
        port = sock.bind_to_random_port('tcp://127.0.0.1')
        peer = plain(context, zmq.PUSH, f'tcp://127.0.0.1:{port}')
        for number in range(3):
            peer.send(b'%d' % number)
        while not sock.poll(1000):  # which takes the wake-up away
            pass
        transport, protocol = await make(zmq.PULL, zmq_sock=sock)
        assert transport.get_extra_info('zmq_socket') is sock
        await until(lambda: len(protocol.messages) == 3)
        assert transport.listeners() == frozenset()
        await end(transport)
        assert sock.closed

    run(main())


# Monitor


def test_monitor(run, context):
    async def main():
        transport, protocol = await make(zmq.ROUTER)
        address = address_of(transport)
        assert (await transport.enable_monitor()).startswith('inproc://')
        peer = plain(context, zmq.DEALER, address)
        await until(lambda: zmq.EVENT_HANDSHAKE_SUCCEEDED in [e.event for e in protocol.events])
        event = protocol.events[0]
        assert isinstance(event, SocketEvent)
        assert event.event == zmq.EVENT_ACCEPTED
        assert event.endpoint == address
        assert event.value >= 0
        transport.enable_monitor(zmq.EVENT_DISCONNECTED)
        protocol.events.clear()
        peer.close()
        await until(lambda: zmq.EVENT_DISCONNECTED in [e.event for e in protocol.events])
        assert await transport.disable_monitor() == ''
        transport.disable_monitor()
        protocol.events.clear()
        peer = plain(context, zmq.DEALER, address)
        peer.send(b'x')
        await until(lambda: protocol.messages)
        assert protocol.events == []
        await end(transport)

    run(main())


def test_no_descriptor_for_a_monitor(run, context, monkeypatch):
    def full(_fd):
        raise OSError(errno.EMFILE, 'Too many open files')

    async def main():
        transport, protocol = await make(zmq.ROUTER)
        with monkeypatch.context() as patched, os_error(errno.EMFILE):
            patched.setattr('os.dup', full)
            transport.enable_monitor()
        transport.enable_monitor(zmq.EVENT_ACCEPTED)
        plain(context, zmq.DEALER, address_of(transport))
        await until(lambda: protocol.events)
        await end(transport)

    run(main())


@pytest.mark.parametrize('context_class', [zmq.Context, zmq.asyncio.Context])
def test_monitor_in_a_context_of_its_own(run, context, context_class):
    async def main():
        with context_class() as own:
            sock = own.socket(zmq.ROUTER, socket_class=zmq.Socket)
            transport, protocol = await make(zmq.ROUTER, zmq_sock=sock)
            await transport.enable_monitor(zmq.EVENT_ACCEPTED)
            plain(context, zmq.DEALER, transport.bind('tcp://127.0.0.1:*'))
            await until(lambda: protocol.events)
            await end(transport)
        # Its end waits for all sockets, the one of the monitor, too.

    run(main())


def test_protocol_without_a_method(run, context):
    class Little(asyncio.BaseProtocol):
        pass

    async def main():
        transport, _protocol = await make(zmq.PULL, Little)
        transport.enable_monitor(zmq.EVENT_ACCEPTED)
        plain(context, zmq.PUSH, address_of(transport)).send(b'x')
        await until(lambda: len(run.errors) == 2)
        assert {type(error['exception']) for error in run.errors} == {AttributeError}
        run.errors.clear()
        await end(transport)

    run(main())


# Addresses


@pytest.mark.parametrize('form', ['given', 'real'])
@pytest.mark.parametrize('wildcard', ['tcp://127.0.0.1:*', 'tcp://lo:*', 'tcp://*:*', 'ipc://*'])
def test_bind(run, context, form, wildcard):
    async def main():
        transport, protocol = await make(zmq.PULL, bind=())
        assert transport.listeners() == frozenset()
        bound = transport.bind(wildcard)
        assert isinstance(bound, str)
        assert '*' not in bound
        before = transport.listeners()
        assert before == transport.bindings() == {bound}
        plain(context, zmq.PUSH, bound.replace('0.0.0.0', '127.0.0.1')).send(b'x')
        await until(lambda: protocol.messages)
        second = await transport.bind(wildcard)
        assert transport.listeners() == {bound, second}
        assert before == {bound}  # a snapshot
        assert transport.unbind(wildcard if form == 'given' else second) == second
        assert transport.listeners() == {bound}
        assert await transport.unbind(wildcard if form == 'given' else bound) == bound
        assert transport.listeners() == frozenset()
        with pytest.raises(OSError, match=r'^\[Errno (2|22)\]'):  # ENOENT, EINVAL of a wildcard
            transport.unbind(wildcard if form == 'given' else bound)
        await end(transport)

    run(main())


def test_bind_in_use(run):
    async def main():
        transport, _protocol = await make(zmq.PULL)
        other, _protocol = await make(zmq.PULL)
        with os_error(errno.EADDRINUSE) as error:
            other.bind(address_of(transport))
        assert isinstance(error.value.__cause__, zmq.ZMQError)
        assert error.value.strerror == error.value.__cause__.strerror
        with os_error(errno.EINVAL):
            other.bind('nonsense')
        assert len(other.listeners()) == 1
        await end(transport, other)

    run(main())


@pytest.mark.parametrize('method', ['bind', 'unbind', 'connect', 'disconnect'])
@pytest.mark.parametrize('endpoint', [None, 1, b'tcp://127.0.0.1:1', ('tcp://127.0.0.1:1',)])
def test_endpoint_is_no_text(run, method, endpoint):
    async def main():
        transport, _protocol = await make(zmq.PULL)
        with pytest.raises(TypeError, match='no str'):
            getattr(transport, method)(endpoint)
        await end(transport)

    run(main())


def test_connect(run):
    async def main():
        one, one_protocol = await make(zmq.PULL)
        two, two_protocol = await make(zmq.PULL)
        transport, _protocol = await make(zmq.PUSH, connect=())
        assert transport.connect(address_of(one)) == address_of(one)
        assert await transport.connect(address_of(two)) == address_of(two)
        assert transport.connections() == {address_of(one), address_of(two)}
        transport.write([b'x'])
        transport.write([b'x'])
        await until(lambda: one_protocol.messages and two_protocol.messages)
        assert await transport.disconnect(address_of(one)) == address_of(one)
        assert transport.connections() == {address_of(two)}
        with os_error(errno.ENOENT):
            transport.disconnect(address_of(one))
        with os_error(errno.EINVAL):
            transport.connect('tcp://127.0.0.1')
        assert transport.connections() == {address_of(two)}
        await end(one, two, transport)

    run(main())


def test_inproc_and_ipv6(run):
    async def main():
        server, protocol = await make(zmq.PULL, bind=['inproc://aio', 'tcp://[::1]:*'])
        [tcp] = server.listeners() - {'inproc://aio'}
        for address in ('inproc://aio', tcp):
            client, _protocol = await make(zmq.PUSH, connect=[address])
            assert client.connections() == {address}
            client.write([address.encode()])
            await until(lambda address=address: (address.encode(),) in protocol.messages)
            await end(client)
        await end(server)

    run(main())


@pytest.mark.parametrize(
    'endpoint',
    [
        'tcp://localhost:5555',
        'tcp://example.com:5555',
        'tcp://eth0;example.com:5555',
        'tcp://*:5555',
        'tcp://:5555',
    ],
)
def test_names_are_not_resolved(run, endpoint):
    async def main():
        transport, _protocol = await make(zmq.PUSH)
        with pytest.raises(ValueError, match=r'await loop\.getaddrinfo\(.*, \'5555\'\)'):
            transport.connect(endpoint)
        with pytest.raises(ValueError, match='resolve a name'):
            await make(zmq.PUSH, connect=[DEAD, endpoint])
        await end(transport)

    run(main())


@given(st.text() | st.text('0123456789abcf.;*:[]%'))
def test_any_address(text):
    host, colon, _port = text.rpartition(';')[2].rpartition(':')
    try:
        check_numeric(f'tcp://{text}')
    except ValueError:
        is_refused = True
    else:
        is_refused = False
    try:
        is_number = bool(ip_address(host.strip('[]')))
    except ValueError:
        is_number = not colon  # without a port it is refused by libzmq, before it looks a name up
    assert is_refused is not is_number


@pytest.mark.parametrize('endpoint', ['tcp://[fe80::1%lo]:5555', 'tcp://127.0.0.1:0;127.0.0.1:9'])
def test_numbers(run, endpoint):
    async def main():
        transport, _protocol = await make(zmq.PUSH, connect=endpoint)
        assert len(transport.connections()) == 1
        assert transport.disconnect(endpoint)
        assert transport.connections() == frozenset()
        await end(transport)

    run(main())


# Subscriptions


def test_subscriptions(run, context):
    async def main():
        transport, protocol = await make(zmq.SUB)
        publisher = plain(context, zmq.XPUB, address_of(transport))
        transport.subscribe(b'a')
        transport.subscribe(b'a')
        transport.setsockopt(zmq.SUBSCRIBE, b'b')
        assert transport.subscriptions() == {b'a', b'b'}
        loop = asyncio.get_running_loop()
        for expected in (b'\1a', b'\1b'):
            assert await loop.run_in_executor(None, publisher.recv) == expected
        for topic in (b'a', b'b', b'c'):
            publisher.send(topic)
        await until(lambda: len(protocol.messages) == 2)
        assert protocol.messages == [(b'a',), (b'b',)]
        transport.unsubscribe(b'a')
        assert await loop.run_in_executor(None, publisher.recv) == b'\0a'
        transport.setsockopt(zmq.UNSUBSCRIBE, b'b')
        assert await loop.run_in_executor(None, publisher.recv) == b'\0b'
        assert transport.subscriptions() == frozenset()
        with pytest.raises(TypeError, match='not bytes'):
            transport.subscribe('a')
        await end(transport)

    run(main())


def test_no_subscriptions(run):
    async def main():
        transport, _protocol = await make(zmq.PUB)
        for call in (
            lambda: transport.subscribe(b'a'),
            lambda: transport.unsubscribe(b'a'),
            transport.subscriptions,
        ):
            with pytest.raises(NotImplementedError, match='PUB'):
                call()
        with os_error(errno.EINVAL):
            transport.setsockopt(zmq.SUBSCRIBE, b'a')
        await end(transport)

    run(main())


# What the transport is


def test_protocol_is_replaced(run, context):
    async def main():
        transport, protocol = await make(zmq.PULL)
        peer = plain(context, zmq.PUSH, address_of(transport))
        other = Recorder()
        assert transport.get_protocol() is protocol
        transport.set_protocol(other)
        assert transport.get_protocol() is other
        peer.send(b'x')
        await until(lambda: other.messages)
        await end(transport)
        assert (protocol.calls, other.calls) == (['made'], ['lost'])

    run(main())


def test_extra_info(run):
    async def main():
        transport, _protocol = await make(zmq.DEALER)
        assert isinstance(transport.get_extra_info('zmq_socket'), zmq.Socket)
        assert transport.get_extra_info('zmq_socket') is transport.get_extra_info('zmq_socket')
        assert transport.get_extra_info('zmq_type') == zmq.DEALER
        assert transport.get_extra_info('else') is None
        assert transport.get_extra_info('else', 1) == 1
        await end(transport)

    run(main())


def test_options(run):
    async def main():
        transport, _protocol = await make(zmq.DEALER)
        transport.setsockopt(zmq.RCVHWM, 5)
        assert transport.getsockopt(zmq.RCVHWM) == 5
        with os_error(errno.EINVAL):
            transport.setsockopt(zmq.RCVHWM, -5)
        await end(transport)

    run(main())


@pytest.mark.parametrize('kind', [zmq.PUB, zmq.XPUB])
def test_publisher(run, context, kind):
    """Somebody subscribes, which a PUB cannot receive."""

    async def main():
        transport, protocol = await make(kind)
        subscriber = context.socket(zmq.SUB)
        subscriber.subscribe(b'a')
        subscriber.connect(address_of(transport))
        if kind == zmq.XPUB:
            await until(lambda: protocol.messages == [(b'\x01a',)])
        else:
            await asyncio.sleep(0.2)  # until it has subscribed, which a PUB does not tell
        transport.write([b'a', b'1'])
        transport.write([b'b', b'2'])
        transport.write([b'a', b'3'])
        assert [subscriber.recv_multipart() for _ in range(2)] == [[b'a', b'1'], [b'a', b'3']]
        assert not transport.is_closing()
        await end(transport)

    run(main())


def test_empty_frames_pass_no_limit(run, context):
    """Which is no limit of bytes: 0 wants an empty buffer."""

    async def main():
        transport, protocol = await make(zmq.PUSH)
        transport.set_write_buffer_limits(high=0)
        transport.write([b''])
        transport.write([b''])
        assert protocol.calls == ['made', 'pause']
        puller = plain(context, zmq.PULL, address_of(transport))
        await until(lambda: protocol.calls == ['made', 'pause', 'resume'])
        assert [puller.recv() for _ in range(2)] == [b'', b'']
        await end(transport)

    run(main())


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_transport_is_dropped_with_its_loop():
    """By somebody who has forgotten to close it; not even its monitor is left."""

    async def main():
        transport, _protocol = await make(zmq.PULL)
        transport.enable_monitor()

    fds = None
    for _ in range(5):
        asyncio.run(main())
        gc.collect()
        fds = fds or open_fds()
    wait_until(lambda: open_fds() <= fds)
    zmq.Context.instance().destroy(0)
