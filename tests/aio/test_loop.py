# SPDX-License-Identifier: ZPL-2.1
"""`create_zmq_connection`, the event loop with a context, and its policy."""

import asyncio
import errno
import gc
import subprocess
import sys
import threading
from contextlib import closing

import pytest
import zmq
import zmq.asyncio
import zmq.eventloop.future

import pyams_zmq.aio
from aio_loops import DEAD, LOOPS, ONE_LOOP, Recorder, Runner, address_of, end, make, os_error
from checks import open_fds, until, wait_until
from pyams_zmq.aio import ZmqEventLoop, ZmqEventLoopPolicy, ZmqTransport, create_zmq_connection

ADDRESS = 'tcp://127.0.0.1:*'


# Connections


async def test_several_endpoints(run, context):
    transport, protocol = await make(zmq.PULL, bind=iter([ADDRESS, ADDRESS]))
    assert isinstance(transport, ZmqTransport)
    assert len(transport.listeners()) == 2
    client, _protocol = await make(zmq.PUSH, connect=transport.listeners())
    assert client.connections() == transport.listeners()
    client.write([b'x'])
    client.write([b'x'])
    await until(lambda: len(protocol.messages) == 2)
    await end(client, transport)


@pytest.mark.parametrize('run', ['tornado', 'zmq'], indirect=True)
async def test_other_loops(run, context):
    """The loop of Tornado and ours: messages, flow control, events and the end."""
    server, protocol = await make(zmq.PULL, connect=())
    address = server.bind(ADDRESS)
    server.enable_monitor(zmq.EVENT_ACCEPTED)
    client, sender = await make(zmq.PUSH)
    client.set_write_buffer_limits(high=0)
    client.write([b'one', b'two'])
    assert sender.calls == ['made', 'pause']
    client.connect(address)
    await until(lambda: protocol.messages and protocol.events)
    assert protocol.messages == [(b'one', b'two')]
    await end(client, server)
    assert sender.calls == ['made', 'pause', 'resume', 'lost']


async def test_options_before_the_connection(run):
    """Options are set on a transport that is not connected yet, as for credentials."""
    server, protocol = await make(zmq.ROUTER)
    client, _protocol = await make(zmq.DEALER, connect=())
    client.setsockopt(zmq.ROUTING_ID, b'me')
    client.connect(address_of(server))
    client.write([b'x'])
    await until(lambda: protocol.messages == [(b'me', b'x')])
    await end(client, server)


async def test_connection_without_an_endpoint(run):
    """It is bound or connected later, and may have options before that."""
    server, protocol = await create_zmq_connection(Recorder, zmq.ROUTER)
    assert not server.listeners()
    client, _protocol = await create_zmq_connection(Recorder, zmq.DEALER)
    client.setsockopt(zmq.ROUTING_ID, b'me')
    client.write([b'early'])
    client.connect(server.bind('tcp://127.0.0.1:*'))
    client.write([b'x'])
    await until(lambda: protocol.messages == [(b'me', b'early'), (b'me', b'x')])
    await end(client, server)


@ONE_LOOP
@pytest.mark.parametrize(
    ('error', 'factory', 'zmq_type', 'kwargs'),
    [
        (TypeError, None, zmq.PULL, {'bind': ADDRESS}),
        (TypeError, Recorder(), zmq.PULL, {'bind': ADDRESS}),
        (TypeError, Recorder, 'PULL', {'bind': ADDRESS}),
        (TypeError, Recorder, None, {'bind': ADDRESS}),
        (TypeError, Recorder, True, {'bind': ADDRESS}),
        (ValueError, Recorder, 1000, {'bind': ADDRESS}),
        (ValueError, Recorder, zmq.PULL, {'bind': ADDRESS, 'connect': ADDRESS}),
        (ValueError, Recorder, zmq.PULL, {'bind': (), 'zmq_sock': object()}),
        (TypeError, Recorder, zmq.PULL, {'bind': 1}),
        (TypeError, Recorder, zmq.PULL, {'bind': b'tcp://127.0.0.1:1'}),
        (TypeError, Recorder, zmq.PULL, {'connect': ['tcp://127.0.0.1:1', None]}),
        (ValueError, Recorder, zmq.PULL, {'connect': ['tcp://localhost:1']}),
        (TypeError, Recorder, zmq.PULL, {'zmq_sock': object()}),
    ],
)
async def test_bad_arguments(run, error, factory, zmq_type, kwargs):
    before = open_fds()
    with pytest.raises(error):
        await create_zmq_connection(factory, zmq_type, **kwargs)
    assert open_fds() <= before


@ONE_LOOP
async def test_unusable_socket(run, context):
    sock = context.socket(zmq.PUSH)
    with pytest.raises(ValueError, match='not of zmq_type PULL'):
        await make(zmq.PULL, zmq_sock=sock)
    assert not sock.closed
    sock.close()
    with pytest.raises(ValueError, match='closed'):
        await make(zmq.PUSH, zmq_sock=sock)
    with (
        zmq.asyncio.Context() as own,
        own.socket(zmq.PUSH) as sock,
        pytest.raises(TypeError, match=r'not a plain zmq\.Socket'),
    ):
        await make(zmq.PUSH, zmq_sock=sock)


async def test_address_in_use(run):
    transport, _protocol = await make(zmq.PULL)
    protocols = []

    def factory():
        protocols.append(Recorder())
        return protocols[-1]

    with os_error(zmq.EADDRINUSE):
        await make(zmq.PULL, factory, bind=[ADDRESS, address_of(transport)])
    await asyncio.sleep(0)  # one iteration of the loop, which must not call connection_lost
    assert protocols[0].calls == []
    await end(transport)


async def test_failing_factory(run, context):
    def factory():
        raise LookupError

    with pytest.raises(LookupError):
        await make(zmq.PULL, factory)
    with pytest.raises(LookupError):
        await make(zmq.PULL, factory, zmq_sock=(sock := context.socket(zmq.PULL)))
    assert not sock.closed


async def test_socket_limit(run):
    context = zmq.Context.instance()
    context.max_sockets = 2
    first, _protocol = await make(zmq.PULL)
    second, _protocol = await make(zmq.PULL)
    with os_error(errno.EMFILE):
        first.enable_monitor()
    with os_error(errno.EMFILE):
        await make(zmq.PULL)
    await end(first, second)


@pytest.mark.parametrize('has_socket', [False, True])
async def test_no_descriptor(run, context, monkeypatch, has_socket):
    """Our own socket is closed, one of the caller stays open."""

    def fail(_fd):
        raise OSError(errno.EMFILE, 'Too many open files')

    sock = context.socket(zmq.PULL)
    with monkeypatch.context() as patched, os_error(errno.EMFILE):
        patched.setattr('os.dup', fail)
        await make(zmq.PULL, **({'zmq_sock': sock} if has_socket else {}))
    assert not sock.closed


async def test_many_connections(run):
    """Connections with and without monitors leave no descriptor open."""
    before = None
    for number in range(60):
        transport, protocol = await make(zmq.PULL)
        client, _protocol = await make(zmq.PUSH, connect=address_of(transport))
        if number % 2:
            client.enable_monitor()
        client.write([b'x'])
        await until(lambda protocol=protocol: protocol.messages)
        client.close()
        transport.close()
        await until(lambda protocol=protocol: 'lost' in protocol.calls)
        if number == 10:
            before = open_fds()
    await until(lambda: len(open_fds() - before) <= 8)  # sockets end some milliseconds later


# Loop


def test_loop_has_a_context():
    async def main():
        loop = asyncio.get_running_loop()
        for number, create in enumerate((loop.create_zmq_connection, create_zmq_connection)):
            address = f'inproc://{number}'
            server, protocol = await create(Recorder, zmq.PULL, bind=address)
            assert server.get_extra_info('zmq_socket').context is loop.zmq_context
            client, _protocol = await create(Recorder, zmq.PUSH, connect=address)
            client.write([b'x'])
            await until(lambda protocol=protocol: protocol.messages)
            await end(client, server)
        return loop.zmq_context

    loop = ZmqEventLoop(io_threads=2)
    assert loop.zmq_context.get(zmq.IO_THREADS) == 2
    with pytest.raises(AttributeError):
        loop.zmq_context.nonsense  # noqa: B018 - pyzmq looks attributes up as options
    context = loop.run_until_complete(main())
    assert not context.closed
    loop.close()
    assert context.closed
    loop.close()


def test_loop_is_closed_with_open_transports():
    before = open_fds()
    loop = ZmqEventLoop()
    transport, protocol = loop.run_until_complete(
        connect_without_service(loop, zmq.PUSH),
    )
    transport.write([b'x'])
    transport.enable_monitor()
    loop.close()  # although the message was not sent
    assert transport.get_extra_info('zmq_socket').closed
    with os_error(zmq.ENOTSOCK):
        transport.getsockopt(zmq.LINGER)
    transport.pause_reading()
    transport.resume_reading()
    transport.write([b'x'])
    assert transport.is_closing()
    transport.close()
    transport.abort()
    assert protocol.calls == ['made']
    del transport, protocol
    gc.collect()
    wait_until(lambda: open_fds() <= before)


@pytest.mark.parametrize('method', ['close', 'abort'])
@pytest.mark.parametrize('kind', LOOPS)
def test_transport_is_closed_after_its_loop(kind, method):
    async def main():
        transport, protocol = await make(zmq.PUSH)
        transport.write([b'x'])
        return transport, protocol

    runner = Runner(kind)
    transport, protocol = runner(main())
    runner.close()
    getattr(transport, method)()
    assert transport.get_extra_info('zmq_socket').closed
    assert transport.get_write_buffer_size() == 0
    assert protocol.calls == ['made']
    assert runner.errors == []
    zmq.Context.instance().term()


def connect_without_service(loop, zmq_type):
    return loop.create_zmq_connection(Recorder, zmq_type, connect=DEAD)


def test_close_of_the_loop_ends_with_an_unsent_message():
    async def main():
        loop = asyncio.get_running_loop()
        transport, protocol = await connect_without_service(loop, zmq.PUSH)
        transport.write([b'x'])
        transport.close()
        await until(lambda: 'lost' in protocol.calls)

    loop = ZmqEventLoop()
    loop.run_until_complete(main())
    loop.close()  # the message lingers for a second


@pytest.mark.parametrize(
    ('error', 'value'), [(TypeError, '1'), (TypeError, None), (TypeError, True), (ValueError, -1)]
)
@pytest.mark.parametrize('factory', [ZmqEventLoop, ZmqEventLoopPolicy])
def test_io_threads(factory, error, value):
    with pytest.raises(error, match='io_threads'):
        factory(io_threads=value)


@pytest.mark.skipif(sys.version_info < (3, 11), reason='asyncio.Runner came with Python 3.11')
def test_runner():
    async def main():
        transport, _protocol = await asyncio.get_running_loop().create_zmq_connection(
            Recorder, zmq.PULL, bind=ADDRESS
        )
        await end(transport)

    with asyncio.Runner(loop_factory=ZmqEventLoop) as runner:
        runner.run(main())


# Policy


@pytest.fixture
def policy():
    """A policy that is not installed."""
    policy = ZmqEventLoopPolicy(io_threads=3)
    yield policy
    policy.set_event_loop(None)


def test_policy(policy):
    loop = policy.get_event_loop()
    assert isinstance(loop, ZmqEventLoop)
    assert loop.zmq_context.get(zmq.IO_THREADS) == 3
    assert policy.get_event_loop() is loop
    loop.close()
    policy.set_event_loop(None)
    with pytest.raises(RuntimeError):
        policy.get_event_loop()
    with closing(policy.new_event_loop()) as other:
        policy.set_event_loop(other)
        assert policy.get_event_loop() is other


def test_policy_in_another_thread(policy):
    found = []

    def get_loop():
        try:
            policy.get_event_loop()
        except RuntimeError as error:
            found.append(error)
        with closing(policy.new_event_loop()) as loop:
            policy.set_event_loop(loop)
            found.append(policy.get_event_loop() is loop)

    thread = threading.Thread(target=get_loop)
    thread.start()
    thread.join()
    assert [type(item) for item in found] == [RuntimeError, bool]
    assert found[1]


@pytest.mark.parametrize('loop', [1, 'loop', object()])
def test_policy_refuses_other_objects(policy, loop):
    with pytest.raises(TypeError, match='not an event loop'):
        policy.set_event_loop(loop)


def run_strictly(program):
    """Run a program with warnings as errors; return its output."""
    program = f"""
import warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # warnings of the imports of Pyramid
    import pyams_zmq
warnings.simplefilter('error')
{program}
"""
    return subprocess.check_output([sys.executable, '-c', program], text=True)


@pytest.mark.skipif(not hasattr(ZmqEventLoopPolicy, 'get_child_watcher'), reason='Python 3.14')
@pytest.mark.filterwarnings('ignore:.*child_watcher:DeprecationWarning')
def test_child_watcher(policy):
    with pytest.raises(TypeError, match='3 is not a child watcher'):
        policy.set_child_watcher(3)
    watcher = policy.get_child_watcher()
    policy.set_child_watcher(watcher)
    assert policy.get_child_watcher() is watcher
    policy.set_child_watcher(None)


@pytest.mark.parametrize('end', ['', 'del loop, kept\ngc.collect()\nprint("collected")'])
@pytest.mark.parametrize('kept', ['transport', 'client'])
def test_loop_that_is_not_closed(end, kept):
    """Neither the end of the program nor garbage collection blocks."""
    program = f"""
import asyncio, gc
from pyams_zmq.aio import *

async def transport():
    return await create_zmq_connection(ZmqProtocol, 6, bind='{ADDRESS}')

async def client():
    client = AsyncZMQClient('127.0.0.1:9', timeout=0.05)
    try:
        await client.call('echo')
    except ConnectionError:
        return client

loop = ZmqEventLoop()
kept = loop.run_until_complete({kept}())
{end}
"""
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', program],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout == ('collected\n' if end else '')


def test_context_of_a_loop():
    with closing(ZmqEventLoop()) as loop:
        assert loop.zmq_context.max_sockets > 1023
        with loop.zmq_context.socket(zmq.PUSH) as socket:
            assert socket.linger == 1000


@ONE_LOOP
@pytest.mark.parametrize('make_context', [zmq.asyncio.Context, zmq.eventloop.future.Context])
def test_sockets_with_futures(run, make_context):
    refused = pytest.raises(TypeError, match=r'not a plain zmq\.Socket')
    with make_context() as context, context.socket(zmq.PULL) as socket, refused:
        run(make(zmq.PULL, zmq_sock=socket))


def test_socket_of_a_terminated_context(run):
    context = zmq.Context()
    socket = context.socket(zmq.PULL)
    thread = threading.Thread(target=context.term)
    thread.start()
    wait_until(lambda: context.closed or is_terminated(socket))
    with os_error(zmq.ETERM):
        run(make(zmq.PULL, zmq_sock=socket))
    socket.close()
    thread.join()


def is_terminated(socket):
    """Return True if the context of a socket is being terminated."""
    try:
        socket.getsockopt(zmq.EVENTS)
    except zmq.ContextTerminated:
        return True
    return False


def test_policy_is_installed():
    program = """
import asyncio, zmq
from pyams_zmq.aio import *
asyncio.set_event_loop_policy(ZmqEventLoopPolicy())
async def main():
    loop = asyncio.get_running_loop()
    transport, _protocol = await loop.create_zmq_connection(ZmqProtocol, zmq.PULL, bind=())
    transport.close()
    await asyncio.sleep(0)  # one iteration of the loop, which closes the socket
    return type(loop).__name__
print(asyncio.run(main()))
"""
    assert run_strictly(program) == 'ZmqEventLoop\n'


# Package


def test_names():
    for name in pyams_zmq.aio.__all__:
        assert getattr(pyams_zmq.aio, name).__doc__
    assert {
        name
        for name, value in vars(pyams_zmq.aio).items()
        if not name.startswith('_') and not isinstance(value, type(sys))
    } == set(pyams_zmq.aio.__all__)


@pytest.mark.parametrize('has_policies', [True, False])
def test_import(has_policies):
    """The import does not warn, does not need policies, and does not load the server."""
    program = f"""
import asyncio, sys
if not {has_policies}:
    del asyncio.DefaultEventLoopPolicy
import pyams_zmq.aio
for name in ('process', 'handler', 'pool', 'device', 'supervisor', 'config'):
    assert f'pyams_zmq.{{name}}' not in sys.modules, name
pyams_zmq.aio.ZmqEventLoop().close()
"""
    run_strictly(program)
