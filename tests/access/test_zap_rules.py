# SPDX-License-Identifier: ZPL-2.1
"""The methods of ThreadAuthenticator, by which a subclass of a process changes who may connect."""

import asyncio
import threading

import pytest
import zmq
import zmq.auth
from zmq.auth import CURVE_ALLOW_ANY
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from access_cases import client_options, make_keys, server_options
from checks import TIMEOUT
from handlers import Handler, MessageHandler, Process
from pyams_zmq.auth import ZAP_DOMAIN, Access, AccessPolicy, Authenticator
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQRefusedError, ZMQStartError
from pyams_zmq.socket import zmq_response, zmq_socket

HERE = '127.0.0.1'
ELSEWHERE = '192.0.2.1'
OLD, NEW = 'editor:old', 'editor:new'
NEW_USERS = {'editor': 'new'}
PUBLIC, _SECRET_KEY = zmq.curve_keypair()
KEY = z85.decode(PUBLIC)


@pytest.fixture
def keys(tmp_path):
    """Folder of keys."""
    return make_keys(tmp_path)


def check(rules, *credentials, address=HERE, mechanism=None, domain=ZAP_DOMAIN):
    """Return the status of a request of libzmq."""
    if mechanism is None:
        mechanism = (b'NULL', b'CURVE', b'PLAIN')[len(credentials)]
    request = [b'1.0', b'7', domain, address.encode(), b'', mechanism, *credentials]
    return rules.answer(request)[2]


def make_rules(access=None):
    """Return an authenticator that was not started."""
    return Authenticator(zmq.Context.instance(), Access() if access is None else access)


# All of them


def test_nothing_is_inherited_that_would_be_ignored():
    """A new method of ThreadAuthenticator has to be looked at, before it does nothing here."""
    ours = {name for cls in Authenticator.__mro__[:2] for name in vars(cls)}
    known = {'curve_user_id', 'is_alive', 'stop', 'context', 'pipe_endpoint', 'thread', 'pipe'}
    hints = {
        name
        for cls in ThreadAuthenticator.__mro__
        for name in (*vars(cls), *getattr(cls, '__annotations__', ()))
        if not name.startswith('_')
    }
    assert issubclass(Authenticator, ThreadAuthenticator)
    assert hints - ours - known == {'log', 'zap_socket'}
    rules = make_rules()
    assert rules.zap_socket is None
    assert rules.log.name == 'PyAMS (zmq)'


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('passwords', {}),
        ('certs', {}),
        ('credentials_providers', {}),
        ('allow_any', True),
        ('encoding', 'latin-1'),
    ],
)
def test_attributes_that_cannot_be_assigned(name, value):
    with pytest.raises(AttributeError):
        setattr(make_rules(), name, value)


def test_attributes_show_the_rules(keys):
    rules = make_rules(Access('editor:old'))
    assert rules.passwords == {'*': {'editor': 'old'}}
    assert (rules.certs, rules.credentials_providers, rules.allow_any) == ({}, {}, False)
    assert rules.encoding == 'utf-8'
    rules.configure_curve('other', keys / 'clients')
    assert list(rules.certs) == ['other']
    assert set(rules.certs['other']) == {
        (zmq.auth.load_certificate(keys / 'clients' / f'{name}.key')[0])
        for name in ('alice', 'bob')
    }
    for mapping in (rules.passwords, rules.certs, rules.certs['other']):
        with pytest.raises(TypeError):
            mapping['*'] = {}
    provider = Provider()
    rules.configure_curve_callback('third', provider)
    assert rules.credentials_providers == {'third': provider}
    rules = make_rules(AccessPolicy({}, ()))
    rules.configure_curve(location=CURVE_ALLOW_ANY)
    assert rules.allow_any
    assert rules.certs == {}


def test_overridden_user_id():
    with pytest.raises(TypeError, match='curve_user_id'):
        type('Renaming', (Authenticator,), {'curve_user_id': lambda self, key: 'me'})
    assert type('Other', (Authenticator,), {}).__name__ == 'Other'
    assert make_rules().curve_user_id(KEY) == PUBLIC.decode()


def test_gssapi():
    with pytest.raises(NotImplementedError, match='GSSAPI'):
        make_rules().configure_gssapi()
    assert check(make_rules(), b'me', mechanism=b'GSSAPI') == b'400'


def test_unknown_arguments():
    rules = make_rules(Access(OLD))
    with pytest.raises(TypeError):
        rules.configure_plain('*', users=NEW_USERS)
    with pytest.raises(TypeError, match=r'Bad domain \(int\)'):
        rules.configure_plain(7, NEW_USERS)
    assert check(rules, b'editor', b'old') == b'200'


# Addresses


def test_allow():
    rules = make_rules()
    rules.allow(ELSEWHERE, '10.0.0.0/8')
    rules.allow('::1')
    assert rules.policy.clients == (ELSEWHERE, '10.0.0.0/8', '::1')
    statuses = {
        address: check(rules, address=address)
        for address in (HERE, ELSEWHERE, '10.2.3.4', '::1', '::ffff:10.0.0.1', '::ffff:127.0.0.1')
    }
    assert statuses == {
        HERE: b'400',
        ELSEWHERE: b'200',
        '10.2.3.4': b'200',
        '::1': b'200',
        '::ffff:10.0.0.1': b'200',
        '::ffff:127.0.0.1': b'400',
    }


def test_deny():
    rules = make_rules(Access(clients='10.0.0.0/8 localhost'))
    rules.deny(HERE)
    rules.deny('10.1.0.0/16')
    assert check(rules) == check(rules, address='localhost:0:0:1') == b'400'
    assert check(rules, address='10.1.0.1') == b'400'
    assert check(rules, address='10.2.0.1') == b'200'
    assert check(rules, address=ELSEWHERE) == b'400'  # it is not in `clients`
    assert check(make_rules(rules.policy), address='10.1.0.1') == b'400'


def test_allow_and_deny():
    rules = make_rules()
    rules.allow(HERE)
    with pytest.raises(ValueError, match='not both'):
        rules.deny(HERE)
    other = make_rules()
    other.deny(HERE)
    with pytest.raises(ValueError, match='not both'):
        other.allow(HERE)
    assert check(other) == b'400'
    assert check(other, address=ELSEWHERE) == b'200'


@pytest.mark.parametrize(
    'addresses', [(), ('example.com',), ('',), (HERE, '10.0.0.300'), ([HERE],)]
)
@pytest.mark.parametrize('name', ['allow', 'deny'])
def test_bad_addresses(name, addresses):
    rules = make_rules()
    with pytest.raises(ValueError, match='address'):
        getattr(rules, name)(*addresses)
    assert check(rules) == b'200'


def test_addresses_hold_for_all_domains():
    rules = make_rules()
    rules.configure_plain('early', NEW_USERS)
    rules.deny(HERE)
    rules.configure_plain('late', NEW_USERS)
    for domain in (b'early', b'late', b'unknown', ZAP_DOMAIN):
        status = check(rules, b'editor', b'new', domain=domain)
        assert status == check(rules, domain=domain) == b'400'
    assert check(rules, b'editor', b'new', domain=b'late', address=ELSEWHERE) == b'200'


def test_rules_of_many_threads():
    """None of them is lost."""
    rules = make_rules()
    barrier = threading.Barrier(8)

    def deny(number):
        barrier.wait()
        for last in range(100):
            rules.deny(f'10.0.{number}.{last}')

    threads = [threading.Thread(target=deny, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rules.policy.denied) == 800


# Passwords


@pytest.mark.parametrize('domain', ['*', '', 'pyams_zmq'])
def test_configure_plain(domain):
    rules = make_rules(Access(OLD))
    rules.configure_plain(domain, dict(NEW_USERS))
    assert check(rules, b'editor', b'old') == b'400'
    assert check(rules, b'editor', b'new') == b'200'
    assert check(rules) == b'400'
    rules.policy.reload()  # SIGHUP does not bring the former users back
    assert check(rules, b'editor', b'old') == b'400'
    assert check(rules, b'editor', b'new') == b'200'


def test_plain_is_required_from_the_first_user_on():
    rules = make_rules()
    assert check(rules) == b'200'
    rules.configure_plain(passwords=NEW_USERS)
    assert check(rules) == b'400'
    assert not rules.policy.admits('anonymous')
    assert check(rules, b'editor', b'new') == b'200'


def test_users_of_another_domain():
    """They are for sockets of your own, with this `zap_domain`."""
    rules = make_rules(Access(OLD))
    rules.configure_plain('other', NEW_USERS)
    assert check(rules, b'editor', b'old') == b'200'
    assert check(rules, b'editor', b'new') == b'400'
    assert check(rules, b'editor', b'new', domain=b'other') == b'200'
    assert check(rules, b'editor', b'old', domain=b'other') == b'400'
    assert check(rules, domain=b'other') == b'400'
    rules.configure_plain('other', {'author': 'third'})
    assert check(rules, b'editor', b'new', domain=b'other') == b'400'
    assert check(rules, b'author', b'third', domain=b'other') == b'200'


def test_users_that_change_in_place():
    users = {'editor': 'new', 'author': 'third'}
    rules = make_rules(Access(OLD))
    rules.configure_plain('*', users)
    del users['editor']
    rules.policy.reload()
    assert check(rules, b'editor', b'new') == b'400'
    assert not rules.policy.admits('editor')
    del users['author']  # without its last user it does not admit everybody
    assert check(rules) == check(rules, b'author', b'third') == b'400'
    assert not rules.policy.admits('author')
    assert rules.policy.has_credentials


def test_users_of_a_changing_file(tmp_path):
    path = tmp_path / 'users'
    path.write_text(OLD)
    rules = make_rules(Access('other:users'))
    rules.configure_plain('*', path)
    assert check(rules, b'editor', b'old') == b'200'
    path.write_text(NEW)
    rules.policy.reload()
    assert check(rules, b'editor', b'old') == b'400'
    assert check(rules, b'editor', b'new') == b'200'


@pytest.mark.parametrize('users', [None, {}, '', [], {'editor': ''}, {'': 'x'}, {'editor': 5}, 'x'])
@pytest.mark.parametrize('domain', ['*', 'other'])
def test_bad_users(domain, users):
    """They change nothing, also not for a domain that had no rule."""
    rules = make_rules(Access(OLD))
    with pytest.raises(ValueError, match=r'No users|Bad credentials'):
        rules.configure_plain(domain, users)
    assert check(rules, b'editor', b'old') == b'200'
    assert check(rules, domain=domain.encode()) == b'400'
    assert rules.policies == {}


def test_users_of_a_server_with_keys(keys):
    rules = make_rules(Access(**server_options('CURVE', keys)))
    with pytest.raises(ValueError, match='one mechanism'):
        rules.configure_plain('*', NEW_USERS)
    assert check(rules) == check(rules, b'editor', b'new') == b'400'


# Keys


class Provider:
    """Accepts some keys, and records what it was asked."""

    def __init__(self, *keys):
        self.keys = set(keys)
        self.calls = []

    def callback(self, domain, key):
        self.calls.append((domain, key))
        return key in self.keys


class AsyncProvider(Provider):
    """The same as a coroutine."""

    async def callback(self, domain, key):
        return super().callback(domain, key)


class FailingProvider:
    """Accepts the first key, then it fails."""

    error = None

    def callback(self, domain, key):
        if self.error is not None:
            raise self.error
        self.error = LookupError('no database')
        return True


def alice_of(keys):
    return zmq.auth.load_certificate(keys / 'clients' / 'alice.key')[0]


def test_folder_of_keys(keys):
    rules = make_rules(Access(**server_options('CURVE', keys)))
    alice, other = alice_of(keys), keys / 'other'
    other.mkdir()
    with pytest.raises(ValueError, match='at least one client'):
        rules.configure_curve(location=other)
    with pytest.raises(ValueError, match='No such file'):
        rules.configure_curve(location=keys / 'nowhere')
    assert check(rules, z85.decode(alice)) == b'200'
    zmq.auth.create_certificates(other, 'carol')
    rules.configure_curve(location=str(other))
    assert check(rules, z85.decode(alice)) == b'400'
    assert not rules.policy.admits(alice.decode())
    (keys / 'clients' / 'alice.key').rename(other / 'alice.key')
    assert check(rules, z85.decode(alice)) == b'400'
    rules.policy.reload()
    assert check(rules, z85.decode(alice)) == b'200'
    rules.policy.reload()
    assert rules.policy.admits(alice.decode())


def test_any_key(keys):
    rules = make_rules(Access(**server_options('CURVE', keys)))
    assert check(rules, KEY) == b'400'
    rules.configure_curve('*', CURVE_ALLOW_ANY)
    rules.policy.reload()
    assert check(rules, KEY) == b'200'
    assert rules.policy.admits(PUBLIC.decode())
    assert check(rules) == b'400'


@pytest.mark.parametrize('cls', [Provider, AsyncProvider])
def test_callback(cls, keys):
    rules = make_rules(Access(**server_options('CURVE', keys)))
    provider = cls(PUBLIC)
    rules.configure_curve_callback('*', provider)
    rules.policy.reload()
    assert not rules.policy.admits(PUBLIC.decode())  # it was not asked about it
    assert check(rules, z85.decode(alice_of(keys))) == b'400'
    assert check(rules, KEY) == b'200'
    assert rules.policy.admits(PUBLIC.decode())
    assert provider.calls == [('*', alice_of(keys)), ('*', PUBLIC)]
    provider.keys.clear()
    assert check(rules, KEY) == b'400'
    assert not rules.policy.admits(PUBLIC.decode())
    rules.configure_curve('*', keys / 'clients')
    assert check(rules, z85.decode(alice_of(keys))) == b'200'
    assert len(provider.calls) == 3


def test_failing_callback():
    rules = make_rules(AccessPolicy({}, ()))
    rules.configure_curve_callback(credentials_provider=FailingProvider())
    assert check(rules, KEY) == b'200'
    assert check(rules, KEY) == b'500'
    assert not rules.policy.admits(PUBLIC.decode())


@pytest.mark.parametrize('provider', [None, object(), lambda domain, key: True])
def test_bad_callback(provider):
    with pytest.raises(TypeError, match='has no method callback'):
        make_rules().configure_curve_callback('*', provider)


def test_keys_of_a_server_with_users(keys):
    rules = make_rules(Access(OLD))
    for location in (keys / 'clients', CURVE_ALLOW_ANY):
        with pytest.raises(ValueError, match='one mechanism'):
            rules.configure_curve('*', location)
    assert check(rules, b'editor', b'old') == b'200'
    assert check(rules, KEY) == b'400'


def test_keys_of_another_domain(keys):
    rules = make_rules(Access(OLD))
    rules.configure_curve('other', keys / 'clients')
    alice = z85.decode(alice_of(keys))
    assert check(rules, alice, domain=b'other') == b'200'
    assert check(rules, KEY, domain=b'other') == b'400'
    assert check(rules, alice) == b'400'


# Sockets


def test_sockets_of_another_mechanism():
    """The rule holds, and the error says that nobody can connect."""
    access = Access()
    rules = make_rules(access)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        access.protect(socket, ZAP_DOMAIN)
        with pytest.raises(ValueError, match='bound without PLAIN'):
            rules.configure_plain('*', NEW_USERS)
        assert check(rules) == b'400'
        access = Access()
        access.protect(socket, ZAP_DOMAIN)
        rules = make_rules(access)
        with pytest.raises(ValueError, match='bound without CURVE'):
            rules.configure_curve('*', CURVE_ALLOW_ANY)
        assert check(rules) == b'400'
        with pytest.raises(ValueError, match='key of the server'):
            access.protect(socket, ZAP_DOMAIN)


# Processes


class RulesHandler(Handler):
    """Changes the rules of its process."""

    def apply(self, args):
        name, *arguments = args
        getattr(self.process.auth_thread, name)(*arguments)
        return [200, name]

    def assign(self, args):
        setattr(self.process, *args)
        return [200, args[0]]


class RulesMessageHandler(MessageHandler):
    """Serves RulesHandler."""

    handler = RulesHandler


class RulesProcess(Process):
    """Applies a rule in a moment of its start."""

    moment = 'after'
    rule = ('allow', HERE)

    def apply(self):
        name, *arguments = self.rule
        getattr(self.auth_thread, name)(*arguments)

    def init_stream(self):
        if self.moment == 'before':
            self.apply()
        super().init_stream()

    def setup(self):
        super().setup()
        if self.moment == 'after':
            self.apply()


PLAIN_CASES = [
    # options, rule, status by user
    ({}, ('allow', HERE), {None: 200, OLD: 401}),
    ({}, ('allow', ELSEWHERE), {None: 401}),
    ({}, ('deny', ELSEWHERE), {None: 200, OLD: 401}),
    ({}, ('deny', HERE), {None: 401}),
    ({'clients': ELSEWHERE}, ('allow', HERE), {None: 200}),
    ({'auth': OLD}, ('deny', HERE), {OLD: 401}),
    ({'auth': OLD}, ('allow', ELSEWHERE), {OLD: 401}),
    ({'auth': OLD}, ('configure_plain', '*', NEW_USERS), {NEW: 200, OLD: 401, None: 401}),
    ({'auth': OLD}, ('configure_plain', '', NEW_USERS), {NEW: 200, OLD: 401}),
    ({'auth': OLD}, ('configure_plain', 'other', NEW_USERS), {OLD: 200, NEW: 401}),
]


@pytest.mark.parametrize('moment', ['before', 'after'])
@pytest.mark.parametrize(('options', 'rule', 'statuses'), PLAIN_CASES)
def test_rules_of_a_process(start, ask, moment, options, rule, statuses):
    process = start(
        factory=type('Ruled', (RulesProcess,), {'moment': moment, 'rule': rule}), **options
    )
    found = {auth: ask(process, ['echo', 1], auth=auth)[0] for auth in statuses}
    assert found == statuses


def test_users_before_the_sockets_are_bound(start, ask):
    """Then the sockets need passwords."""
    rule = ('configure_plain', '*', NEW_USERS)
    process = start(factory=type('Ruled', (RulesProcess,), {'moment': 'before', 'rule': rule}))
    assert ask(process, ['echo', 1], auth=NEW) == [200, 1]
    assert ask(process, ['echo', 1], auth=OLD)[0] == 401
    assert ask(process, ['echo', 1])[0] == 401


@pytest.mark.parametrize(
    ('moment', 'rule', 'text'),
    [
        ('after', ('configure_plain', '*', NEW_USERS), 'bound without PLAIN'),
        ('after', ('configure_curve', '*', CURVE_ALLOW_ANY), 'bound without CURVE'),
        ('before', ('configure_curve', '*', CURVE_ALLOW_ANY), 'key of the server'),
        ('after', ('configure_plain', '*'), 'No users'),
        ('after', ('allow', 'example.com'), "'example.com'"),
    ],
)
def test_rules_that_cannot_be_followed(moment, rule, text):
    """The process does not start, so that nobody gets in."""
    process = type('Ruled', (RulesProcess,), {'moment': moment, 'rule': rule})()
    process.start()
    with pytest.raises(ValueError, match=text):
        process.wait_ready()
    process.join()


def test_keys_of_a_process(start, ask, keys):
    public = zmq.auth.load_certificate(keys / 'stranger.key')[0]
    alice, stranger = client_options('good key', keys), client_options('unknown key', keys)
    for rule, statuses in [
        (('configure_curve', '*', CURVE_ALLOW_ANY), [200, 200]),
        (('configure_curve_callback', '*', Provider(public)), [401, 200]),
        (('configure_curve_callback', '*', AsyncProvider(public)), [401, 200]),
    ]:
        process = start(
            factory=type('Ruled', (RulesProcess,), {'rule': rule}), **server_options('CURVE', keys)
        )
        found = [ask(process, ['echo', 1], **options)[0] for options in (alice, stranger)]
        assert found == statuses
        assert ask(process, ['echo', 1])[0] == 401


def call(process, message, auth=None):
    """Return the reply to a message on a new connection, 401 if it is refused."""
    with ZMQClient(process.bound_address, auth=auth, timeout=TIMEOUT) as client:
        try:
            return client.request(message)
        except ZMQRefusedError:
            return [401, None]


def test_open_connections(start):
    """Messages of a user that was removed are refused; addresses are checked at the handshake."""
    process = start(auth=OLD, handler=RulesMessageHandler)
    with zmq_socket(process.bound_address, auth=OLD) as kept:

        def send(*message):
            kept.send_json(message)
            return zmq_response(kept)

        assert send('apply', ['configure_plain', '*', {'editor': 'new', 'author': 'x'}])[0] == 200
        assert call(process, ['echo', 1], auth=OLD)[0] == 401
        assert send('echo', 1) == [200, 1]  # a changed password is for new connections
        assert send('apply', ['deny', HERE])[0] == 200
        assert call(process, ['echo', 1], auth=NEW)[0] == 401
        assert send('assign', ['passwords', 'author:x'])[0] == 200
        assert send('echo', 1) == [401, 'Your access was withdrawn']


def test_open_connections_of_a_process_without_credentials(start):
    process = start(handler=RulesMessageHandler)
    with zmq_socket(process.bound_address) as kept:
        for message, status in (
            (['echo', 1], 200),
            (['apply', ['configure_plain', '*', NEW_USERS]], 500),
            (['echo', 1], 401),
        ):
            kept.send_json(message)
            assert zmq_response(kept)[0] == status
    assert call(process, ['echo', 1])[0] == 401
    assert call(process, ['echo', 1], auth=NEW)[0] == 401


def test_attributes_of_a_running_process(start):
    """In the child they act; in the parent an assignment would change nothing."""
    process = start(auth=OLD, handler=RulesMessageHandler)
    for name, value in (('passwords', NEW_USERS), ('clients', ELSEWHERE)):
        with pytest.raises(ZMQStartError, match='has started'):
            setattr(process, name, value)
    assert call(process, ['assign', ['passwords', NEW_USERS]], auth=OLD)[0] == 200
    assert call(process, ['echo', 1], auth=OLD)[0] == 401
    with zmq_socket(process.bound_address, auth=NEW) as kept:
        kept.send_json(['assign', ['clients', ELSEWHERE]])
        assert zmq_response(kept)[0] == 200
        assert call(process, ['echo', 1], auth=NEW)[0] == 401
        kept.send_json(['assign', ['clients', None]])
        assert zmq_response(kept)[0] == 200
    assert call(process, ['echo', 1], auth=NEW) == [200, 1]


# A ZAP handler in a loop of its own


async def _handle(rules, message):
    await rules.handle_zap_message(message)


def test_requests_that_somebody_else_receives():
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        rules = Authenticator(context, Access(clients=ELSEWHERE))
        rules.zap_socket = context.socket(zmq.REP)
        rules.zap_socket.bind('inproc://requests')
        asking.connect('inproc://requests')
        asking.send_multipart([b'1.0', b'7', ZAP_DOMAIN, HERE.encode(), b'', b'NULL'])
        message = rules.zap_socket.recv_multipart()
        asyncio.run(_handle(rules, message))
        assert asking.recv_multipart()[2] == b'400'
        rules.stop()
