# SPDX-License-Identifier: ZPL-2.1
"""Errors of the protocol and of messages go to the exception handler of the loop."""

import asyncio
import errno
from contextlib import suppress
from functools import partial

import pytest
import zmq
import zmq.asyncio

from aio_loops import Recorder, address_of, end, make, os_error, plain
from checks import until


@pytest.mark.parametrize('exception', [ValueError, asyncio.CancelledError])
async def test_failing_protocol(run, context, exception):
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
    reported = {str(error['exception']) for error in run.errors}
    assert reported == {'made', 'pause', 'resume', 'message', 'event', 'lost'}
    assert all(isinstance(error['exception'], exception) for error in run.errors)
    assert run.errors[0]['transport'] is transport
    assert run.errors[0]['protocol'] is protocol
    run.errors.clear()


def test_interrupt_in_the_protocol(run, context):
    def react(transport, data):
        if data == (b'interrupt',):
            raise KeyboardInterrupt

    async def begin():
        transport, protocol = await make(zmq.PULL, partial(Recorder, react))
        peer = plain(context, zmq.PUSH, address_of(transport))
        transport.pause_reading()
        peer.send(b'interrupt')
        peer.send(b'next')
        return transport, protocol

    async def interrupt():
        transport.resume_reading()
        await asyncio.sleep(5)  # until the exception ends the loop

    class Leaver(Recorder):
        def connection_lost(self, exc):
            raise SystemExit

    async def leave():
        other, _protocol = await make(zmq.PULL, Leaver)
        await end(other)
        await asyncio.sleep(5)  # until the exception ends the loop

    def settle():
        for task in asyncio.all_tasks(run.loop):
            task.cancel()
        with suppress(RuntimeError):  # the run that was interrupted ends only now
            run_it(asyncio.sleep(0.01))  # lets the cancelled tasks end

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


async def test_protocol_without_methods(run, context):
    class Little(asyncio.BaseProtocol):
        pass

    transport, _protocol = await make(zmq.PULL, Little)
    transport.enable_monitor(zmq.EVENT_ACCEPTED)
    plain(context, zmq.PUSH, address_of(transport)).send(b'x')
    await until(lambda: len(run.errors) == 2)
    assert {type(error['exception']) for error in run.errors} == {AttributeError}
    run.errors.clear()
    await end(transport)


async def test_unknown_peer(run, context):
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


async def test_buffered_message_that_cannot_be_sent(run, context):
    class Choosy(zmq.Socket):
        def send(self, data, *args, **kwargs):
            if data == b'bad':
                raise zmq.ZMQError(errno.EMSGSIZE)
            if data == b'worse':
                raise ValueError(data)
            return super().send(data, *args, **kwargs)

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
