# SPDX-License-Identifier: ZPL-2.1
"""The end of a transport: closed, aborted, or ended with its socket or context."""

import asyncio
import gc
import threading
from functools import partial

import pytest
import zmq
import zmq.asyncio

from aio_loops import (
    DEAD,
    INPROC,
    Recorder,
    address_of,
    end,
    make,
    make_unconnected,
    os_error,
    plain,
)
from checks import open_fds, until, wait_until
from pyams_zmq.aio.pump import GUARD


async def test_close_sends_what_is_buffered(run, context):
    transport, protocol = await make_unconnected(high=1)
    for number in range(3):
        transport.write([b'%d' % number])
    transport.close()
    transport.close()
    assert transport.is_closing()
    assert 'PUSH, closing, not reading, 3 messages (3 bytes)' in repr(transport)
    transport.write([b'too late'])
    await asyncio.sleep(0)  # one iteration of the loop, which must not call connection_lost
    assert protocol.calls == ['made', 'pause']
    peer = plain(context, zmq.PULL, address_of(transport))
    await until(lambda: 'lost' in protocol.calls)
    assert protocol.calls == ['made', 'pause', 'resume', 'lost']
    assert [peer.recv() for _number in range(3)] == [b'0', b'1', b'2']
    assert not peer.poll(10)  # milliseconds, for what must not come
    assert transport.get_extra_info('zmq_socket').closed


async def test_close_lingers(run, context):
    """A message in the socket is sent although the transport is closed right after `write`."""
    peer = context.socket(zmq.PULL)
    port = peer.bind_to_random_port('tcp://127.0.0.1')
    transport, protocol = await make(zmq.PUSH, connect=f'tcp://127.0.0.1:{port}')
    transport.write([b'message'])
    transport.close()
    await until(lambda: protocol.calls == ['made', 'lost'])
    assert peer.recv() == b'message'


async def test_no_message_after_close(run, context):
    transport, protocol = await make(
        zmq.PULL, partial(Recorder, lambda transport, data: transport.close())
    )
    peer = plain(context, zmq.PUSH, address_of(transport))
    transport.pause_reading()
    for _number in range(10):
        peer.send(b'x')
    transport.resume_reading()
    await until(lambda: 'lost' in protocol.calls)
    await asyncio.sleep(GUARD)  # for what must not come
    assert len(protocol.messages) == 1
    assert protocol.calls == ['made', 'lost']


@pytest.mark.parametrize('first', ['nothing', 'close'])
async def test_abort_drops_messages(run, first):
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
        for _ in range(2):  # the loop calls connection_lost in its next iteration
            await asyncio.sleep(0)
        assert protocol.calls == ['made', 'pause', 'resume', 'lost']
    # The context was terminated although the messages were not sent.


async def test_abort_after_close(run):
    with zmq.Context() as own:
        sock = own.socket(zmq.PUSH)
        sock.connect(DEAD)
        transport, protocol = await make(zmq.PUSH, zmq_sock=sock)
        transport.write([b'x'])
        transport.close()
        transport.abort()
        await asyncio.sleep(0)  # the loop calls connection_lost
        assert protocol.calls == ['made', 'lost']


async def test_terminated_context_ends_the_transport(run, caplog):
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
    check_record(caplog, 'PULL')


def check_record(caplog, *texts):
    """Check that the only record says that a transport has ended."""
    [record] = caplog.records
    assert record.levelname == 'ERROR'
    for text in (*texts, 'ends: other code has closed its socket, or terminated its context'):
        assert text in record.message


async def test_context_destroyed_by_other_code(run, caplog):
    """That closes the socket of the transport, which no event announces."""
    transport, protocol = await make(zmq.PULL)
    address = address_of(transport)
    zmq.Context.instance().destroy(0)
    await until(lambda: len(protocol.calls) == 2)
    assert protocol.calls == ['made', zmq.ENOTSOCK]
    check_record(caplog, address)


async def test_terminated_context_after_a_write(run):
    """The check after a send gets ETERM: libzmq does not handle commands in each send."""

    class Ended(zmq.Socket):
        is_ended = False

        def getsockopt(self, option):
            if self.is_ended and option == zmq.EVENTS:
                raise zmq.ZMQError(zmq.ETERM)
            return super().getsockopt(option)

    sock = zmq.Context.instance().socket(zmq.PAIR, socket_class=Ended)
    transport, protocol = await make(zmq.PAIR, zmq_sock=sock)
    await asyncio.sleep(0)  # takes no time: the first turn
    sock.is_ended = True
    transport.write([b'x'])
    assert protocol.calls == ['made']
    await until(lambda: len(protocol.calls) == 2)
    assert protocol.calls == ['made', zmq.ETERM]


async def test_socket_closed_by_other_code(run, caplog):
    transport, protocol = await make(zmq.PULL)
    address = address_of(transport)
    transport.get_extra_info('zmq_socket').close(0)
    await until(lambda: len(protocol.calls) == 2)
    assert protocol.calls == ['made', zmq.ENOTSOCK]
    check_record(caplog, address)
    transport, protocol = await make_unconnected()
    transport.get_extra_info('zmq_socket').close(0)
    transport.write([b'x'])
    transport.write([b'x'])
    await asyncio.sleep(0)  # the loop calls connection_lost
    assert protocol.calls == ['made', zmq.ENOTSOCK]
    transport, protocol = await make_unconnected()
    transport.write([b'x'])
    transport.get_extra_info('zmq_socket').close(0)
    await until(lambda: len(protocol.calls) == 2)
    assert protocol.calls == ['made', zmq.ENOTSOCK]


async def test_socket_closed_in_the_protocol(run):
    def close(transport, data):
        transport.get_extra_info('zmq_socket').close(0)

    transport, protocol = await make(zmq.PAIR, partial(Recorder, close), bind=INPROC)
    transport.write([b'x'])
    peer = plain(zmq.Context.instance(), zmq.PAIR, INPROC)
    peer.send(b'x')  # now it can both receive and send, and receives
    await until(lambda: len(protocol.calls) == 2)
    peer.close()
    assert protocol.calls == ['made', zmq.ENOTSOCK]


async def test_after_the_end(run):
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
    await asyncio.sleep(0)  # one iteration of the loop, which must not call it again
    assert protocol.calls == ['made', 'lost']


@pytest.mark.filterwarnings('ignore::ResourceWarning')
def test_unclosed_transport_is_collected_with_its_loop():
    """Its monitor is closed, too."""

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
