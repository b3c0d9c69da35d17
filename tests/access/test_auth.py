# SPDX-License-Identifier: ZPL-2.1
"""Access control: the parsers, the policy, and the authenticator on real sockets."""

import logging
import threading
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils.monitor import recv_monitor_message

from checks import running_threads, wait_until
from handlers import BrokenLog, Process
from pyams_zmq.auth import (
    ZAP_DOMAIN,
    AccessPolicy,
    Authenticator,
    Verdict,
    parse_clients,
    parse_users,
)
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.wire.frames import receive, send_frame

ALLOWED = Verdict(b'200', b'OK', 'user')
SECRET = 'pa:ss wörd'

# Users


@pytest.mark.parametrize(
    ('auth', 'users'),
    [
        (None, {}),
        ('', {}),
        ('user:password', {'user': 'password'}),
        ('user:pass:word', {'user': 'pass:word'}),
        ('user::', {'user': ':'}),
        (f'é:{SECRET}', {'é': SECRET}),
        ('user: ', {'user': ' '}),
        (f'{"u" * 254}:{"é" * 127}', {'u' * 254: 'é' * 127}),
        ('\nalice:wonder\r\n\n bob:the:builder \n', {'alice': 'wonder', 'bob': 'the:builder'}),
        (['alice:wonder', 'bob: '], {'alice': 'wonder', 'bob': ' '}),
        (('user:password',), {'user': 'password'}),
        ({'alice': 'wonder', 'bob': 'the:builder'}, {'alice': 'wonder', 'bob': 'the:builder'}),
        ('new:one\n# old:secret\n  # older:secret', {'new': 'one'}),
        ('a:b\x0cc:d', {'a': 'b\x0cc:d'}),
    ],
)
def test_parse_users(auth, users):
    assert parse_users(auth) == users


@pytest.mark.parametrize(
    'auth',
    [
        'secret',
        ':secret',
        'secret:',
        ':',
        ' ',
        b'user:secret',
        ('user', 'secret'),
        ['user:secret', 'bob'],
        ['user:secret', 17],
        ['user:secret', 'user:other secret'],
        {'user': ''},
        {'user': b'secret'},
        {17: 'secret'},
        [],
        {},
        '\n',
        'user:secret\nbob',
        {'user:secret'},
        17,
        True,
        pytest.param(object(), id='object'),
        f'user:secret{"é" * 127}',  # too long for PLAIN
        f'{"u" * 255}:secret',
        'user:secret\udcff',  # not UTF-8
        'secret\udcff:password',
    ],
    ids=repr,
)
def test_parse_bad_users(auth):
    with pytest.raises(
        ValueError, match="Bad credentials: (write auth='user:password'|a user)"
    ) as caught:
        parse_users(auth)
    assert 'secret' not in repr(caught.value)
    assert type(caught.value) is ValueError  # a UnicodeError would contain the secret
    assert caught.value.__context__ is None or 'secret' not in repr(vars(caught.value.__context__))


@given(st.text(max_size=80), st.text(max_size=80))
def test_parse_any_users(user, password):
    try:
        users = parse_users(f'{user}:{password}')
    except ValueError as error:
        assert not user or not password or ':' in user or '\n' in user + password
        assert len(password) < 3 or password not in str(error)  # noqa: PT017 - or none
    else:
        lines = [f'{name}:{secret}' for name, secret in users.items()]
        assert '\n' in user + password or lines == [f'{user}:{password}']
        assert not any(':' in name for name in users)


@given(st.one_of(st.text(), st.binary(), st.integers(), st.lists(st.text()), st.none()))
def test_parse_anything_as_users(auth):
    try:
        users = parse_users(auth)
    except ValueError as error:
        assert str(error).startswith('Bad credentials: ')  # noqa: PT017 - or none
    else:
        assert all(isinstance(text, str) and text for item in users.items() for text in item)


# Clients


@pytest.mark.parametrize(
    ('clients', 'networks'),
    [
        (None, []),
        ('', []),
        (' \n', []),
        ([], []),
        ('10.0.0.1', ['10.0.0.1/32']),
        ('10.0.0.1 10.0.0.2', ['10.0.0.1/32', '10.0.0.2/32']),
        ('10.0.0.1,10.0.0.2', ['10.0.0.1/32', '10.0.0.2/32']),
        (' 10.0.0.1 ,\n\t10.0.0.2,\r\n', ['10.0.0.1/32', '10.0.0.2/32']),
        ('10.0.0.0/8\n192.168.1.0/255.255.255.0', ['10.0.0.0/8', '192.168.1.0/24']),
        ('::1', ['::1/128']),
        ('2001:db8::/32 10.0.0.1', ['2001:db8::/32', '10.0.0.1/32']),
        ('localhost', ['127.0.0.0/8', '::1/128']),
        ('10.0.0.1 localhost', ['10.0.0.1/32', '127.0.0.0/8', '::1/128']),
        (['10.0.0.1', 'localhost'], ['10.0.0.1/32', '127.0.0.0/8', '::1/128']),
        (('10.0.0.1',), ['10.0.0.1/32']),
        ({'10.0.0.1'}, ['10.0.0.1/32']),
        (iter(['10.0.0.1', '10.0.0.2']), ['10.0.0.1/32', '10.0.0.2/32']),
        ([ip_network('10.0.0.0/8')], ['10.0.0.0/8']),
    ],
)
def test_parse_clients(clients, networks):
    assert parse_clients(clients) == tuple(map(ip_network, networks))


@pytest.mark.parametrize(
    ('clients', 'culprit'),
    [
        ('example.com', "'example.com'"),
        ('10.0.0.1 www.example.com', "'www.example.com'"),
        ('10.0.0.256', "'10.0.0.256'"),
        ('10.0.0.1/8', "'10.0.0.1/8'"),  # ambiguous: a host or a network
        ('10.0.0.1/33', "'10.0.0.1/33'"),
        ('10.0.0.1;10.0.0.2', "'10.0.0.1;10.0.0.2'"),
        ('10.0.0.1:5555', "'10.0.0.1:5555'"),
        ('*', "'*'"),
        ('[::1]', "'[::1]'"),
        ('::g', "'::g'"),
        ('10.0.0.010', "'10.0.0.010'"),  # some read this as octal
        (['10.0.0.1 10.0.0.2'], "'10.0.0.1 10.0.0.2'"),
        ('fe80::1::2', "'fe80::1::2'"),
        ('editor:S3cret', '(it may contain a password)'),
        ('10.0.0.1:S3cret', '(it may contain a password)'),
        (['editor:S3 cret'], '(it may contain a password)'),
        ('ed:beef', '(it may contain a password)'),
        ([None], '(NoneType)'),
        ([b'10.0.0.1'], '(bytes)'),
        ([b'\x7f\0\0\1'], '(bytes)'),  # ipaddress accepts the packed form
        ([5], '(int)'),  # ipaddress accepts it as 0.0.0.5
        (b'10.0.0.1', '(int)'),
        ([('10.0.0.0', 8)], '(tuple)'),
        (5, '(int)'),
        (True, '(bool)'),
    ],
    ids=repr,
)
def test_parse_bad_clients(clients, culprit):
    with pytest.raises(ValueError, match='Bad client address') as caught:
        parse_clients(clients)
    assert f'Bad client address {culprit}: write ' in str(caught.value)


@given(st.lists(st.ip_addresses()), st.sampled_from([' ', ',', '\n', ', ', '\t\r\n']))
def test_parse_any_addresses(addresses, separator):
    networks = parse_clients(separator.join(map(str, addresses)))
    assert networks == tuple(
        ip_network(str(getattr(address, 'ipv4_mapped', None) or address)) for address in addresses
    )
    assert parse_clients(map(str, addresses)) == networks


@given(
    st.one_of(
        st.text(),
        st.text('0123456789./:abcdeflost, '),
        st.binary(),
        st.integers(),
        st.lists(st.one_of(st.text('0123456789./:'), st.integers(), st.none())),
    )
)
def test_parse_anything_as_clients(clients):
    try:
        networks = parse_clients(clients)
    except ValueError as error:
        assert str(error).startswith('Bad client address ')  # noqa: PT017 - or none
    else:
        assert parse_clients(networks) == networks
        assert networks or not str(clients or '').replace(',', ' ').strip()


# The policy

USERS = {'user': SECRET, 'ünï': 'ö', 'empty': ''}
NETWORKS = '10.0.0.1 192.168.0.0/16 2001:db8::/32'
GOOD = [b'user', SECRET.encode()]


# clients, address of the peer, True if it is allowed
ADDRESSES = [
    (None, '203.0.113.5', True),
    (None, '::1', True),
    (None, 'localhost:0:0:4711', True),
    (None, '', True),
    (NETWORKS, '10.0.0.1', True),
    (NETWORKS, '10.0.0.2', False),
    (NETWORKS, '192.168.255.1', True),
    (NETWORKS, '192.169.0.1', False),
    (NETWORKS, '2001:db8::5', True),
    (NETWORKS, '2001:db9::5', False),
    (NETWORKS, '2001:db8::5%eth0', True),
    (NETWORKS, '::ffff:10.0.0.1', True),  # from a socket of both families
    (NETWORKS, '::ffff:10.0.0.2', False),
    (NETWORKS, '::1', False),
    (NETWORKS, '127.0.0.1', False),
    ('fe80::/10', 'fe80::1%2', True),
    ('0.0.0.0/0', '203.0.113.5', True),
    ('0.0.0.0/0', '::ffff:203.0.113.5', True),
    ('0.0.0.0/0', '2001:db8::5', False),
    ('localhost', '127.0.0.1', True),
    ('localhost', '127.8.9.10', True),
    ('localhost', '::1', True),
    ('localhost', '::ffff:127.0.0.1', True),
    ('localhost', '128.0.0.1', False),
    # An ipc peer counts as 127.0.0.1.
    ('localhost', 'localhost:1000:1000:4711', True),
    ('127.0.0.1', 'localhost:1000:1000:4711', True),
    ('::1', 'localhost:1000:1000:4711', False),
    (NETWORKS, 'localhost:1000:1000:4711', False),
]


def check(users, clients, address, mechanism, credentials):
    return AccessPolicy(users, parse_clients(clients)).check(address, mechanism, credentials)


@pytest.mark.parametrize(
    ('users', 'mechanism', 'credentials', 'verdict'),
    [
        ({}, b'NULL', [], Verdict(b'200', b'OK', 'anonymous')),
        ({}, b'PLAIN', GOOD, Verdict(b'400', b'Bad credentials')),
        ({}, b'CURVE', [b'key'], Verdict(b'400', b'Bad credentials')),
        (USERS, b'NULL', [], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', GOOD, Verdict(b'200', b'OK', 'user')),
        (USERS, b'PLAIN', ['ünï'.encode(), 'ö'.encode()], Verdict(b'200', b'OK', 'ünï')),
        (USERS, b'PLAIN', [b'user', b'other'], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', [b'user', b''], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', [b'user', SECRET.encode() + b'x'], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', [b'user', b'\xff'], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', [b'User', SECRET.encode()], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', [b'', b''], Verdict(b'400', b'Bad credentials')),
        (USERS, b'PLAIN', [b'nobody', b''], Verdict(b'400', b'Bad credentials')),
        (USERS, b'CURVE', [b'key'], Verdict(b'400', b'Bad credentials')),
        (USERS, b'GSSAPI', [b'user'], Verdict(b'400', b'Bad credentials')),
        (USERS, b'', [], Verdict(b'400', b'Bad credentials')),
    ],
)
def test_policy(users, mechanism, credentials, verdict):
    refusal = Verdict(b'400', b'Address not allowed')
    results = [
        (clients, address, check(users, clients, address, mechanism, credentials))
        for clients, address, _is_allowed in ADDRESSES
    ]
    assert results == [
        (clients, address, verdict if is_allowed else refusal)
        for clients, address, is_allowed in ADDRESSES
    ]


@pytest.mark.parametrize('address', ['', 'example.com', '10.0.0.1:5555', 'localhost'])
def test_policy_does_not_guess_addresses(address):
    """The address of a disconnected peer is empty: it does not count as local."""
    with pytest.raises(ValueError, match='address'):
        check({}, 'localhost', address, b'NULL', [])


def test_policy_keeps_no_state():
    """The decision on a connection does not depend on earlier ones."""
    policy = AccessPolicy(USERS, parse_clients('10.0.0.1'))
    for _ in range(2):
        assert policy.check('10.0.0.1', b'PLAIN', GOOD).status == b'200'
        assert policy.check('10.0.0.2', b'PLAIN', GOOD).status == b'400'
        assert policy.check('10.0.0.1', b'PLAIN', [b'user', b'x']).status == b'400'


# The authenticator

HANDSHAKE_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class Policy:
    """Returns or raises the given results in turn, then allows all connections."""

    def __init__(self, *results):
        self.results = list(results)
        self.seen = []

    def check(self, *args):
        self.seen.append(args)
        result = self.results.pop(0) if self.results else ALLOWED
        if isinstance(result, BaseException):
            raise result
        return result


@contextmanager
def serve(policy, *addresses, **options):
    """Reply with the number of the message on some addresses, under a policy."""

    def run():
        for number in range(1000):
            if socket.recv() == b'end':
                break
            socket.send_json(number)

    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.linger = 0
        socket.zap_domain = ZAP_DOMAIN
        socket.ipv6 = True
        for name, value in options.items():
            setattr(socket, name, value)
        authenticator = Authenticator(context, policy)
        authenticator.start()
        endpoints = []
        for address in addresses or ['tcp://127.0.0.1:*']:
            socket.bind(address)
            endpoints.append(socket.last_endpoint.decode())
        # The last message comes over inproc, which has no access control.
        socket.bind('inproc://end')
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield endpoints if addresses else endpoints[0]
        finally:
            with context.socket(zmq.REQ) as end:
                end.connect('inproc://end')
                end.send(b'end')
                thread.join(5)
            authenticator.stop()


def handshake(endpoint, auth=None):
    """Connect, and send a message if that succeeds; return 'allowed' or the status."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        socket.ipv6 = '[' in endpoint
        if auth is not None:
            socket.plain_username, socket.plain_password = auth
        with socket.get_monitor_socket(HANDSHAKE_EVENTS) as monitor:
            socket.connect(endpoint)
            assert monitor.poll(5000)
            event = recv_monitor_message(monitor)
            socket.disable_monitor()
        if event['event'] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            socket.send(b'')
            assert socket.poll(5000)
            return 'allowed'
        return event['value']


def test_authenticator():
    policy = Policy(Verdict(b'400', b'No'), ALLOWED, Verdict(b'300', b'Later'))
    with serve(policy) as endpoint:
        assert handshake(endpoint) == 400
        assert handshake(endpoint) == 'allowed'
    assert policy.seen == [('127.0.0.1', b'NULL', []), ('127.0.0.1', b'NULL', [])] or all(
        seen == ('::ffff:127.0.0.1', b'NULL', []) for seen in policy.seen
    )


@pytest.mark.parametrize('frame', [0, 5])
def test_reply_that_cannot_be_sent(monkeypatch, frame):
    """Its peer stays refused, the next one is accepted."""
    frames = iter(range(100))

    def fail_once(*args):
        if next(frames) == frame:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        return send_frame(*args)

    monkeypatch.setattr('pyams_zmq.wire.frames.send_frame', fail_once)
    with serve(Policy(ALLOWED)) as endpoint:
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            with socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
                socket.connect(endpoint)
                assert not monitor.poll(300)
                socket.disable_monitor()
        assert handshake(endpoint) == 'allowed'


def test_wake_up_without_a_request(monkeypatch):
    wake_ups = []

    def find_nothing_at_first(socket):
        wake_ups.append(socket)
        return None if len(wake_ups) == 1 else receive(socket)

    monkeypatch.setattr('pyams_zmq.auth.authenticator.receive', find_nothing_at_first)
    with serve(Policy()) as endpoint:
        assert handshake(endpoint) == 'allowed'
    assert len(wake_ups) > 1


def test_authenticator_with_plain():
    with serve(AccessPolicy(USERS, ()), plain_server=True) as endpoint:
        for credentials in ([b'user', b'x'], [b'nobody', b'x'], [b'user', b'\xff']):
            assert handshake(endpoint, credentials) == 400
            assert handshake(endpoint, [b'\xff', b'x']) == 500
            assert handshake(endpoint, GOOD) == 'allowed'


def test_user_of_a_message():
    """The receiver of a message gets the name of the user."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.zap_domain = ZAP_DOMAIN
        socket.plain_server = True
        authenticator = Authenticator(context, AccessPolicy(USERS, ()))
        authenticator.start()
        port = socket.bind_to_random_port('tcp://127.0.0.1')
        client = zmq_socket(f'127.0.0.1:{port}', auth=f'ünï:{USERS["ünï"]}')
        client.send_json(1)
        assert socket.recv(copy=False).get('User-Id') == 'ünï'
        authenticator.stop()


@pytest.mark.parametrize(
    'result',
    [
        LookupError(SECRET),
        UnicodeDecodeError('utf-8', SECRET.encode(), 0, 1, SECRET),
        RecursionError(),
        None,
        SECRET,
        (b'200', b'OK'),
        Verdict(b'200', b'OK', None),
        Verdict(b'200', b'OK', '\udcff'),
    ],
    ids=repr,
)
def test_failing_policy(result, caplog):
    """It refuses the connection, logs no secret, and decides on the next one."""
    caplog.set_level(logging.DEBUG)
    policy = Policy(result)
    with serve(policy, plain_server=True) as endpoint:
        assert handshake(endpoint, GOOD) == 500
        assert handshake(endpoint, GOOD) == 'allowed'
    [message] = [item.getMessage() for item in caplog.records if item.levelname == 'ERROR']
    assert message.startswith('Access control failed (')
    assert SECRET not in caplog.text


def test_long_series_of_failures():
    policy = Policy(*[ValueError('no')] * 50)
    with serve(policy) as endpoint:
        for _ in range(50):
            assert handshake(endpoint) == 500
        assert handshake(endpoint) == 'allowed'


def test_broken_log():
    """If the log cannot be written, the authenticator still works."""
    logger = logging.getLogger('PyAMS (zmq)')
    handler = BrokenLog()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with serve(Policy(ValueError('no'), Verdict(b'400', b'No'))) as endpoint:
            assert handshake(endpoint) == 500
            assert handshake(endpoint) == 400
            assert handshake(endpoint) == 'allowed'
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.mark.parametrize(
    'message',
    [
        [b'1.0', b'7'],
        [b'1.0', b'7', b'', b'127.0.0.1', b''],
        [b'1.0', b'7', b'', b'\xff', b'', b'NULL'],
        [b'1.0', b'7', b'', b'127.0.0.1', b'', b'PLAIN'],
        [b'1.0', b'7', b'', b'127.0.0.1', b'', b'PLAIN', b'user'],
        [b'1.0', b'7', b'', b'127.0.0.1', b'', b'PLAIN', b'user', SECRET.encode(), b''],
        [b'1.0', b'7', b'', b'127.0.0.1', b'', b'PLAIN', b'\xff', SECRET.encode()],
    ],
)
def test_reply_to_malformed_requests(message, caplog):
    caplog.set_level(logging.DEBUG)
    with zmq.Context() as context:
        authenticator = Authenticator(context, AccessPolicy(USERS, ()))
        version, request_id, status, _text, user, metadata = authenticator.answer(message)
    assert (version, request_id, user, metadata) == (b'1.0', b'7', b'', b'')
    assert status in {b'400', b'500'}
    assert SECRET not in caplog.text


def test_enter_of_an_authenticator():
    """The function is called first, and in the thread."""
    entered = []
    with zmq.Context() as context:
        authenticator = Authenticator(
            context, Policy(), lambda: entered.append(threading.current_thread())
        )
        authenticator.start()
        thread = authenticator.thread
        authenticator.stop()
    assert entered == [thread]


def test_stop_of_an_authenticator():
    before = running_threads()
    with zmq.Context() as context:
        authenticator = Authenticator(context, Policy())
        authenticator.stop()  # it was not started
        authenticator.start()
        assert authenticator.is_alive()
        authenticator.stop()
        assert not authenticator.is_alive()
        authenticator.stop()
    assert running_threads() <= before


# Processes


def send_from(source, endpoint, **options):
    """Send a message from an address of the loopback network; return the status, 401 if refused."""
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.linger = 0
        for name, value in options.items():
            setattr(socket, name, value)
        with socket.get_monitor_socket(HANDSHAKE_EVENTS) as monitor:
            socket.connect(endpoint.replace('tcp://', f'tcp://{source}:0;'))
            assert monitor.poll(5000)
            event = recv_monitor_message(monitor)['event']
            socket.disable_monitor()
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return 401
        socket.send_json(['echo', source])
        return zmq_response(socket, timeout=5)[0]


PLAIN = {'plain_username': b'user', 'plain_password': b'password'}


@pytest.mark.parametrize(
    ('auth', 'options'), [(None, {}), ('user:password', PLAIN)], ids=['NULL', 'PLAIN']
)
@pytest.mark.parametrize(
    ('clients', 'statuses'),
    [
        (None, [200, 200]),
        ('127.0.0.1', [200, 401]),
        ('127.0.0.2', [401, 200]),
        ('127.0.0.0/30 10.0.0.0/8', [200, 200]),
        ('10.0.0.1', [401, 401]),
        ('localhost', [200, 200]),
    ],
)
def test_clients(start, auth, options, clients, statuses):
    process = start(auth=auth, clients=clients)
    sources = ['127.0.0.1', '127.0.0.2']
    for _ in range(2):
        assert [
            send_from(source, process.bound_address, **options) for source in sources
        ] == statuses


@pytest.mark.parametrize(
    ('clients', 'status'),
    [(None, 200), ('127.0.0.1', 200), ('localhost', 200), ('10.0.0.1', 401), ('::1', 401)],
)
@pytest.mark.parametrize('address', ['path', 'abstract'])
def test_clients_of_ipc(start, ask, tmp_path, clients, status, address):
    uri = f'ipc://{tmp_path}/socket' if address == 'path' else f'ipc://@{tmp_path}'
    process = start(uri, clients=clients)
    assert ask(process, ['echo', 1])[0] == status


def test_address_of_an_ipc_peer(tmp_path):
    """libzmq passes it in the form that the policy expects."""
    policy = Policy()
    uris = [f'ipc://{tmp_path}/socket', f'ipc://@{tmp_path}']
    with serve(policy, *uris) as endpoints:
        for endpoint in endpoints:
            assert handshake(endpoint) == 'allowed'
    assert [address.split(':')[0] for address, *_ in policy.seen] == ['localhost', 'localhost']
    assert all(address.count(':') == 3 for address, *_ in policy.seen)


@pytest.mark.parametrize(
    ('clients', 'statuses'),
    [('::1', [200, 401]), ('127.0.0.1', [401, 200]), ('localhost', [200, 200])],
)
def test_both_families(start, ask, clients, statuses):
    """A socket of both families sees IPv4 peers under IPv6 addresses."""
    process = start('[::]:*', clients=clients)
    port = process.bound_address.rpartition(':')[2]
    answers = [ask(f'{host}:{port}', ['echo', 1])[0] for host in ('[::1]', '127.0.0.1')]
    assert answers == statuses


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        ({'auth': 'secret'}, "write auth='user:password'"),
        ({'clients': 'www.example.com'}, "'www.example.com'"),
    ],
)
def test_bad_arguments_of_a_process(arguments, text):
    with pytest.raises(ValueError, match=text) as caught:
        Process(**arguments)
    assert 'secret' not in str(caught.value)


# Secrets


class VerboseProcess(Process):
    """Logs at level DEBUG."""

    def __init__(self, log_path, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_path = log_path

    def setup(self):
        root = logging.getLogger()
        root.setLevel(logging.DEBUG)
        root.addHandler(logging.FileHandler(self.log_path))
        super().setup()


class FailingVerboseProcess(VerboseProcess):
    def setup(self):
        super().setup()
        raise RuntimeError


def test_secrets_are_not_logged(start, ask, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    path = tmp_path / 'log'
    secrets = ['s3cret-of-the-server', 's3cret-of-a-client']
    process = start(log_path=path, auth=f'user:{secrets[0]}', factory=VerboseProcess)
    texts = [repr(process), str(process)]
    socket = zmq_socket(process.bound_address, auth=f'user:{secrets[0]}')
    texts += [repr(socket), str(socket)]
    socket.close()
    assert ask(process, ['echo', 1], auth=f'user:{secrets[0]}') == [200, 1]
    for auth in (f'user:{secrets[1]}', f'nobody:{secrets[0]}', f'us\x80:{secrets[0]}', None):
        reply = ask(process, ['echo', 1], auth=auth)
        assert reply[0] == 401
        texts.append(str(reply))
    for kind in ('cmdline', 'environ', 'comm'):
        texts.append(Path(f'/proc/{process.pid}/{kind}').read_bytes().decode(errors='replace'))
    process.stop()
    texts += [repr(process), str(process)]
    log = path.read_text(encoding='utf-8')
    assert log.count('Connection refused') >= 3  # the log was written
    output = capfd.readouterr()
    texts += [log, caplog.text, output.out, output.err]
    assert not [text for text in texts if 's3cret' in text]


def test_failure_does_not_log_secrets(tmp_path, caplog, capfd):
    process = FailingVerboseProcess(tmp_path / 'log', auth='user:s3cret')
    with pytest.raises(ZMQStartError) as caught:
        process.wait_ready()
    texts = [repr(caught.value)]
    process.start()
    with pytest.raises(RuntimeError) as caught:
        process.wait_ready()
    process.join(5)
    texts += [repr(caught.value), (tmp_path / 'log').read_text(encoding='utf-8'), caplog.text]
    assert 'Traceback' in texts[2]
    assert 's3cret' not in str(texts) + str(capfd.readouterr())


def test_refusals_are_logged(start, ask, tmp_path):
    process = start(log_path=tmp_path / 'log', auth='user:password', factory=VerboseProcess)
    assert ask(process, ['echo', 1], auth='user:x')[0] == 401
    wait_until(
        lambda: 'Connection refused: 127.0.0.1 Bad credentials' in (tmp_path / 'log').read_text()
    )
