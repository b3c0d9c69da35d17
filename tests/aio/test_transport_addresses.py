# SPDX-License-Identifier: ZPL-2.1
"""The endpoints that a transport binds and connects to."""

import errno
from ipaddress import ip_address

import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from aio_loops import DEAD, ONE_LOOP, address_of, end, make, os_error, plain
from checks import until
from pyams_zmq.aio.address import check_numeric


@pytest.mark.parametrize('form', ['given', 'real'])
@pytest.mark.parametrize('wildcard', ['tcp://127.0.0.1:*', 'tcp://lo:*', 'tcp://*:*', 'ipc://*'])
async def test_bind(run, context, form, wildcard):
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


async def test_bind_in_use(run):
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


@ONE_LOOP
@pytest.mark.parametrize('method', ['bind', 'unbind', 'connect', 'disconnect'])
@pytest.mark.parametrize('endpoint', [None, 1, b'tcp://127.0.0.1:1', ('tcp://127.0.0.1:1',)])
async def test_endpoint_is_not_a_str(run, method, endpoint):
    transport, _protocol = await make(zmq.PULL)
    with pytest.raises(TypeError, match='not a str'):
        getattr(transport, method)(endpoint)
    await end(transport)


async def test_connect(run):
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


async def test_inproc_and_ipv6(run):
    server, protocol = await make(zmq.PULL, bind=['inproc://aio', 'tcp://[::1]:*'])
    [tcp] = server.listeners() - {'inproc://aio'}
    for address in ('inproc://aio', tcp):
        client, _protocol = await make(zmq.PUSH, connect=[address])
        assert client.connections() == {address}
        client.write([address.encode()])
        await until(lambda address=address: (address.encode(),) in protocol.messages)
        await end(client)
    await end(server)


@ONE_LOOP
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
async def test_host_names_are_refused(run, endpoint):
    transport, _protocol = await make(zmq.PUSH)
    with pytest.raises(ValueError, match=r'await loop\.getaddrinfo\(.*, \'5555\'\)'):
        transport.connect(endpoint)
    with pytest.raises(ValueError, match='resolve a name'):
        await make(zmq.PUSH, connect=[DEAD, endpoint])
    await end(transport)


@settings(deadline=None)  # on a loaded machine a step takes long
@given(st.text() | st.text('0123456789abcf.;*:[]%'))
def test_check_numeric_accepts_only_addresses(text):
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
        is_number = not colon  # libzmq refuses an endpoint without a port
    assert is_refused is not is_number


@ONE_LOOP
@pytest.mark.parametrize('endpoint', ['tcp://[fe80::1%lo]:5555', 'tcp://127.0.0.1:0;127.0.0.1:9'])
async def test_numeric_addresses_are_accepted(run, endpoint):
    transport, _protocol = await make(zmq.PUSH, connect=endpoint)
    assert len(transport.connections()) == 1
    assert transport.disconnect(endpoint)
    assert transport.connections() == frozenset()
    await end(transport)
