# SPDX-License-Identifier: ZPL-2.1
"""Addresses: their forms, and the parser."""

import os

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from pyams_zmq.wire.endpoint import Endpoint, is_local, parse_ip, port_of

LONGEST_PATH = '/' + 'x' * (zmq.IPC_PATH_MAX_LEN - 1)

BINDABLE = [
    # address, protocol, host, port, URI
    ('127.0.0.1:5555', 'tcp', '127.0.0.1', 5555, 'tcp://127.0.0.1:5555'),
    ('tcp://127.0.0.1:5555', 'tcp', '127.0.0.1', 5555, 'tcp://127.0.0.1:5555'),
    (('127.0.0.1', 5555), 'tcp', '127.0.0.1', 5555, 'tcp://127.0.0.1:5555'),
    (['127.0.0.1', '5555'], 'tcp', '127.0.0.1', 5555, 'tcp://127.0.0.1:5555'),
    ('127.0.0.1', 'tcp', '127.0.0.1', 0, 'tcp://127.0.0.1:0'),
    ('127.0.0.1:*', 'tcp', '127.0.0.1', 0, 'tcp://127.0.0.1:0'),
    (('127.0.0.1', '*'), 'tcp', '127.0.0.1', 0, 'tcp://127.0.0.1:0'),
    (('127.0.0.1', 0), 'tcp', '127.0.0.1', 0, 'tcp://127.0.0.1:0'),
    ('*', 'tcp', '*', 0, 'tcp://*:0'),
    ('*:5555', 'tcp', '*', 5555, 'tcp://*:5555'),
    ('localhost', 'tcp', '127.0.0.1', 0, 'tcp://127.0.0.1:0'),
    ('localhost:00080', 'tcp', '127.0.0.1', 80, 'tcp://127.0.0.1:80'),
    ('eth0:5555', 'tcp', 'eth0', 5555, 'tcp://eth0:5555'),
    ('a.host-name_1:65535', 'tcp', 'a.host-name_1', 65535, 'tcp://a.host-name_1:65535'),
    ('[::1]:5555', 'tcp', '[::1]', 5555, 'tcp://[::1]:5555'),
    ('[::]', 'tcp', '[::]', 0, 'tcp://[::]:0'),
    (('::1', 5555), 'tcp', '[::1]', 5555, 'tcp://[::1]:5555'),
    (('[::1]', 5555), 'tcp', '[::1]', 5555, 'tcp://[::1]:5555'),
    ('[fe80::1%eth0]:1', 'tcp', '[fe80::1%eth0]', 1, 'tcp://[fe80::1%eth0]:1'),
    ('[::ffff:1.2.3.4]:1', 'tcp', '[::ffff:1.2.3.4]', 1, 'tcp://[::ffff:1.2.3.4]:1'),
    ('ipc:///run/a b.sock', 'ipc', '/run/a b.sock', None, 'ipc:///run/a b.sock'),
    ('ipc://relative', 'ipc', 'relative', None, 'ipc://relative'),
    ('ipc:///a://b', 'ipc', '/a://b', None, 'ipc:///a://b'),
    ('ipc://@name', 'ipc', '@name', None, 'ipc://@name'),
    (f'ipc://{LONGEST_PATH}', 'ipc', LONGEST_PATH, None, f'ipc://{LONGEST_PATH}'),
]

CONNECTABLE = [
    ('localhost:5555', 'tcp', 'localhost', 5555, 'tcp://localhost:5555'),
    ('tcp://example.org:80', 'tcp', 'example.org', 80, 'tcp://example.org:80'),
    (('::1', 5555), 'tcp', '[::1]', 5555, 'tcp://[::1]:5555'),
    ('ipc:///run/sock', 'ipc', '/run/sock', None, 'ipc:///run/sock'),
]

REFUSED = [
    # address, bind, reason
    ('', True, 'not a host and a port'),
    (':5555', True, 'not a host and a port'),
    ('host:', True, 'not a host and a port'),
    ('host:http', True, 'not a host and a port'),
    ('host:-1', True, 'not a host and a port'),
    ('host:+1', True, 'not a host and a port'),
    ('host: 1', True, 'not a host and a port'),
    ('host:1\n', True, 'not a host and a port'),
    ('host:123456', True, 'not a host and a port'),
    ('host:\u0665', True, 'not a host and a port'),
    ('höst:1', True, 'not a host and a port'),
    ('-host:1', True, 'not a host and a port'),
    ('host.:1', True, 'not a host and a port'),
    ('user@host:1', True, 'not a host and a port'),
    ('host:1/path', True, 'not a host and a port'),
    ('1:2:3', True, 'not a host and a port'),
    ('::1', True, 'not a host and a port'),
    ('[::1', True, 'not a host and a port'),
    ('[]:1', True, 'not a host and a port'),
    ('[::1]5555', True, 'not a host and a port'),
    ('[1.2.3.4]:1', True, "'1.2.3.4'"),
    ('[:::]:1', True, ':::'),
    ('a;b:1', True, 'not a host and a port'),
    ('tcp://', True, 'not a host and a port'),
    ('tcp://tcp://host:1', True, 'not a host and a port'),
    ('host:65536', True, r'port \d+ is not in 1\.\.65535'),
    ('host:99999', False, r'port \d+ is not in 1\.\.65535'),
    ('udp://host:1', True, "unknown protocol 'udp'"),
    ('TCP://host:1', True, "unknown protocol 'TCP'"),
    ('://host:1', True, "unknown protocol ''"),
    ('ipc://', True, 'path is empty'),
    ('ipc://@', True, 'path is empty'),
    ('ipc:///a\0b', True, 'contains a NUL'),
    (f'ipc://{LONGEST_PATH}x', True, 'longer than'),
    ('ipc:///' + 'é' * 60, True, 'longer than'),
    ('ipc:///\ud800', True, 'surrogates'),
    ('*:5555', False, 'only for binding'),
    ('host', False, 'needs a port'),
    ('host:0', False, 'needs a port'),
    ('host:*', False, 'needs a port'),
    (None, True, 'not a string'),
    (5555, True, 'not a string'),
    (1.5, True, 'not a string'),
    (b'host:5555', True, 'not a string'),
    ({'host': 1}, True, 'not a string'),
    ((), True, 'unpack'),
    (('host',), True, 'unpack'),
    (('host', 1, 2), True, 'unpack'),
    (('host', None), True, 'port is not a number'),
    (('host', 1.0), True, 'port is not a number'),
    (('host', True), True, 'port is not a number'),
    (('host', b'1'), True, 'port is not a number'),
    (('host', -1), True, 'not a host and a port'),
    (('host', ''), True, 'not a host and a port'),
    (('a:b', 1), True, 'a:b'),
    ((None, 1), True, '.'),
    ((5, 1), True, '.'),
    ((b'host', 1), True, '.'),
    (([1], 1), True, '.'),
    (([':'], 1), True, '.'),
    (({':'}, 1), True, '.'),
    (('tcp', '//127.0.0.1:80'), True, '.'),
    (('ipc', '///run/sock'), True, '.'),
]


@pytest.mark.parametrize(('address', 'protocol', 'host', 'port', 'uri'), BINDABLE)
def test_bindable(address, protocol, host, port, uri):
    endpoint = Endpoint.parse(address, bind=True)
    assert endpoint == Endpoint(protocol, host, port)
    assert endpoint.uri == str(endpoint) == uri


@pytest.mark.parametrize(('address', 'protocol', 'host', 'port', 'uri'), CONNECTABLE)
def test_connectable(address, protocol, host, port, uri):
    endpoint = Endpoint.parse(address, bind=False)
    assert endpoint == Endpoint(protocol, host, port)
    assert endpoint.uri == uri


@pytest.mark.parametrize(('address', 'bind', 'reason'), REFUSED)
def test_refused(address, bind, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        Endpoint.parse(address, bind=bind)
    assert repr(address) in str(caught.value)
    assert "write 'host:port'" in str(caught.value)


@pytest.mark.parametrize(
    ('address', 'protocol', 'expected'),
    [
        ('/run/sock', 'ipc', Endpoint('ipc', '/run/sock')),
        ('@name', 'ipc', Endpoint('ipc', '@name')),
        ('host:1', 'tcp', Endpoint('tcp', 'host', 1)),
        ('tcp://host:1', 'ipc', Endpoint('tcp', 'host', 1)),
    ],
)
def test_default_protocol(address, protocol, expected):
    assert Endpoint.parse(address, bind=False, protocol=protocol) == expected


@pytest.mark.parametrize('protocol', ['udp', '', None, 5])
def test_unknown_default_protocol(protocol):
    with pytest.raises(ValueError, match='unknown protocol'):
        Endpoint.parse('host:1', bind=False, protocol=protocol)


@pytest.mark.parametrize(
    ('address', 'is_ipv6', 'path'),
    [
        ('127.0.0.1:1', False, None),
        ('[::1]:1', True, None),
        ('ipc:///run/sock', False, '/run/sock'),
        ('ipc://@name', False, None),
        ('ipc://[x', False, '[x'),
    ],
)
def test_what_it_is(address, is_ipv6, path):
    endpoint = Endpoint.parse(address, bind=True)
    assert (endpoint.is_ipv6, endpoint.path) == (is_ipv6, path)


@pytest.mark.parametrize(
    ('uri', 'port'),
    [
        ('tcp://127.0.0.1:5555', 5555),
        ('tcp://[::1]:80', 80),
        ('ipc:///run/sock:80', None),
        ('inproc://name', None),
    ],
)
def test_port_of(uri, port):
    assert port_of(uri) == port


def test_frozen():
    endpoint = Endpoint.parse('host:1', bind=True)
    with pytest.raises(AttributeError):
        endpoint.port = 2
    assert hash(endpoint) == hash(Endpoint('tcp', 'host', 1))


@pytest.mark.parametrize(
    'address', ['127.0.0.1', ('127.0.0.1', 0), 'localhost:*', '*', 'lo', 'ipc://@pyams_zmq-test']
)
def test_libzmq_binds_it(address):
    endpoint = Endpoint.parse(address, bind=True)
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(endpoint.uri)
        bound = Endpoint.parse(socket.last_endpoint.decode(), bind=True)
        assert bound.protocol == endpoint.protocol
        assert bound.port == port_of(socket.last_endpoint.decode())


# Strings made of parts of addresses, so that many are valid.
PIECES = [
    'tcp',
    'ipc',
    '://',
    ':',
    '*',
    '[',
    ']',
    '::',
    '.',
    '/',
    '@',
    '%',
    '-',
    '0',
    '1',
    '80',
    '65536',
    'localhost',
    'a',
    'é',
    '\0',
    '\n',
    '\ud800',
    ';',
    ' ',
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=8).map(''.join))
NUMBERS = st.one_of(st.integers(), st.integers(0, 70_000), st.floats(), st.booleans())
THINGS = st.one_of(TEXTS, NUMBERS, st.none(), st.binary(), st.lists(TEXTS), st.sets(TEXTS))
TUPLES = st.one_of(st.tuples(TEXTS, NUMBERS), st.tuples(THINGS, THINGS), st.lists(THINGS))


@given(st.one_of(THINGS, TUPLES, st.recursive(THINGS, st.tuples)), st.booleans(), THINGS)
def test_only_value_errors(address, bind, protocol):
    for known in ('tcp', 'ipc', protocol):
        try:
            endpoint = Endpoint.parse(address, bind=bind, protocol=known)
        except ValueError:
            continue
        assert isinstance(endpoint.host, str)
        assert Endpoint.parse(endpoint.uri, bind=bind) == endpoint


@given(
    st.one_of(
        st.ip_addresses(v=4).map(str),
        st.ip_addresses(v=6).map(str),
        st.from_regex(r'\A[a-z][a-z0-9-]{0,20}[a-z0-9]\Z'),
    ),
    st.integers(1, 65_535),
)
def test_round_trip(host, port):
    endpoint = Endpoint.parse((host, port), bind=False)
    assert (endpoint.protocol, endpoint.port) == ('tcp', port)
    assert endpoint.host.strip('[]') == host
    for bind in (False, True):
        parsed = Endpoint.parse((host, port), bind=bind)
        assert Endpoint.parse(parsed.uri, bind=bind) == parsed


@pytest.mark.parametrize(
    ('address', 'expected'),
    [
        ('127.0.0.1', '127.0.0.1'),
        ('::1', '::1'),
        ('::ffff:192.0.2.1', '192.0.2.1'),
        ('localhost:0:0:1', '127.0.0.1'),
        ('192.0.2.1', '192.0.2.1'),
        ('fe80::1%lo', 'fe80::1'),
    ],
)
def test_parse_ip(address, expected):
    assert str(parse_ip(address)) == expected


@pytest.mark.parametrize(
    ('address', 'expected'),
    [
        ('tcp://127.0.0.1:5555', True),
        ('tcp://[::1]:5555', True),
        ('tcp://[::ffff:127.0.0.1]:5555', True),
        ('tcp://0.0.0.0:5555', False),
        ('tcp://[::]:5555', False),
        ('tcp://192.0.2.1:5555', False),
        ('tcp://[fe80::1%lo]:5555', False),
        ('ipc:///run/sock', True),
        ('ipc://@name', True),
    ],
)
def test_is_local(address, expected):
    assert is_local(address) is expected


@pytest.mark.parametrize(
    ('one', 'two', 'expected'),
    [
        ('127.0.0.1:1', '127.0.0.1:1', True),
        ('127.0.0.1:1', 'localhost:1', True),
        ('127.0.0.1:1', '127.0.0.1:2', False),
        ('127.0.0.1:1', '127.0.0.2:1', False),
        ('127.0.0.1:1', '*:1', True),
        ('*:1', '0.0.0.0:1', True),
        ('*:1', '*:2', False),
        ('*:1', '[::1]:1', False),
        ('[::]:1', '[::1]:1', True),
        ('[::]:1', '127.0.0.1:1', True),
        ('[::]:1', '*:1', True),
        ('*', '*', False),  # any free port
        ('[::1]:1', '[0:0:0:0:0:0:0:1]:1', True),
        ('[0::0]:1', '127.0.0.1:1', True),
        ('[::]:1', '[0:0::0]:1', True),
        ('[::ffff:127.0.0.1]:1', '127.0.0.1:1', True),
        ('[::ffff:127.0.0.1]:1', '127.0.0.2:1', False),
        ('[::ffff:0.0.0.0]:1', '127.0.0.2:1', True),
        ('[fe80::1%eth0]:1', '[FE80:0::1%eth0]:1', True),
        ('[fe80::1%eth0]:1', '[fe80::1%eth1]:1', False),
        ('eth0:1', 'eth0:1', True),
        ('ipc://one', 'ipc://one', True),
        ('ipc://one', f'ipc://{os.getcwd()}/one', True),
        ('ipc://one', 'ipc://@one', False),
        ('ipc://@one', 'ipc://@one', True),
        ('ipc://one', '127.0.0.1:1', False),
    ],
)
def test_overlaps(one, two, expected):
    one, two = (Endpoint.parse(address, bind=True) for address in (one, two))
    assert one.overlaps(two) == two.overlaps(one) == expected


def test_overlaps_through_a_link(tmp_path):
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to('real')
    real, link, other = (
        Endpoint.parse(f'ipc://{tmp_path}/{name}', bind=True)
        for name in ('real/socket', 'link/socket', 'link/other')
    )
    assert real.overlaps(link)
    assert link.overlaps(real)
    assert not real.overlaps(other)
