# SPDX-License-Identifier: ZPL-2.1
"""The access rules of a server, as an object and as attributes of its process."""

import logging
from ipaddress import ip_network

import pytest
import zmq

from checks import wait_until
from handlers import Handler, MessageHandler, Process
from pyams_zmq.auth import ZAP_DOMAIN, Access
from pyams_zmq.curve import CurveServer
from pyams_zmq.device import ThreadDevice
from pyams_zmq.exceptions import ZMQStartError


def make_curve(*clients):
    """Return a CurveServer with some clients."""
    _public, secret = zmq.curve_keypair()
    return CurveServer(secret, clients or [zmq.curve_keypair()[0]])


def test_no_rules():
    access = Access()
    assert (access.users, access.networks, access.clients, access.curve) == ({}, (), None, None)
    assert not access.has_credentials
    assert access.check('203.0.113.5', b'NULL', []).status == b'200'
    assert access.admits('anonymous')


def test_users_and_addresses():
    access = Access('alice:wonder', '10.0.0.1, 192.168.0.0/16')
    assert access.users == {'alice': 'wonder'}
    assert access.clients == ('10.0.0.1', '192.168.0.0/16')
    assert access.networks == (ip_network('10.0.0.1'), ip_network('192.168.0.0/16'))
    assert access.has_credentials
    assert access.check('10.0.0.1', b'PLAIN', [b'alice', b'wonder']).user == 'alice'
    assert access.check('10.0.0.2', b'PLAIN', [b'alice', b'wonder']).status == b'400'
    assert access.admits('alice')
    assert not access.admits('bob')


def test_keys():
    curve = make_curve()
    access = Access(curve=curve)
    assert access.has_credentials
    assert access.keys == curve.clients
    assert access.check('10.0.0.1', b'NULL', []).status == b'400'


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'auth': 'alice'}, 'Bad credentials'),
        ({'clients': 'example.com'}, "Bad client address 'example.com'"),
        ({'auth': 'alice:wonder', 'curve': True}, 'Give auth or curve: a socket has one mechanism'),
    ],
)
def test_rules_that_cannot_be_used(options, text):
    if 'curve' in options:
        options['curve'] = make_curve()
    with pytest.raises(ValueError, match=text):
        Access(**options)


def test_reload_of_users(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / 'users'
    path.write_text('alice:wonder\nbob:builder\n')
    access = Access(path)
    path.write_text('nonsense')
    with pytest.raises(ValueError, match='Bad credentials'):
        access.reload()
    assert access.try_reload('The service') is False
    assert access.admits('alice')
    path.write_text('bob:builder')
    assert access.try_reload('The service') is True
    assert not access.admits('alice')
    assert [record.getMessage().partition(':')[0] for record in caplog.records] == [
        'The service keeps its users and keys',
        'The service has read its users and keys again',
    ]


def test_reload_of_keys(tmp_path):
    zmq.auth.create_certificates(tmp_path, 'alice')
    zmq.auth.create_certificates(tmp_path, 'bob')
    access = Access(curve=CurveServer(tmp_path / 'bob.key_secret', tmp_path))
    assert len(access.keys) == 2
    (tmp_path / 'alice.key').rename(tmp_path / 'alice')
    access.reload()
    [key] = access.keys
    assert access.admits(key)
    (tmp_path / 'bob.key').rename(tmp_path / 'bob')
    with pytest.raises(ValueError, match='at least one client'):
        access.reload()
    assert access.keys == {key}


def test_rules_keep_the_keys_that_they_have_read(tmp_path):
    """Two servers can have one CurveServer: each follows its own `reload`."""
    zmq.auth.create_certificates(tmp_path, 'alice')
    zmq.auth.create_certificates(tmp_path, 'bob')
    curve = CurveServer(tmp_path / 'bob.key_secret', tmp_path)
    one, other = Access(curve=curve), Access(curve=curve)
    (tmp_path / 'alice.key').unlink()
    one.reload()
    assert (len(one.keys), len(other.keys)) == (1, 2)


@pytest.mark.parametrize(
    ('access', 'options'),
    [
        (Access(), (zmq.NULL, 0)),
        (Access('alice:wonder'), (zmq.PLAIN, 1)),
        (Access(curve=make_curve()), (zmq.CURVE, 0)),
    ],
    ids=['NULL', 'PLAIN', 'CURVE'],
)
def test_protected_socket(access, options):
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        access.protect(socket, b'workers')
        assert (socket.mechanism, socket.plain_server) == options
        assert socket.zap_domain == b'workers'
        access.protect(socket, ZAP_DOMAIN)
        assert socket.zap_domain == b'pyams_zmq'


@pytest.mark.parametrize(
    ('access', 'uri', 'text'),
    [
        (Access(), 'tcp://127.0.0.1:1', ''),
        (Access(), 'ipc:///path', ''),
        (Access(), 'tcp://0.0.0.0:1', 'without authentication'),
        (Access('alice:wonder'), 'tcp://[::]:1', 'with passwords in clear text'),
        (Access(curve=make_curve()), 'tcp://0.0.0.0:1', ''),
    ],
)
def test_warning_of_exposure(access, uri, text, caplog):
    access.warn_of_exposure('The service', uri)
    assert len(caplog.records) == bool(text)
    assert text in caplog.text


# Attributes of a process, as users of version 2 know them


@pytest.mark.parametrize(
    ('auth', 'passwords'),
    [
        (None, None),
        ('', None),
        ('alice:open:sesame', {'alice': 'open:sesame'}),
        ({'alice': 'wonder', 'bob': 'builder'}, {'alice': 'wonder', 'bob': 'builder'}),
    ],
)
def test_passwords(auth, passwords):
    process = Process(auth=auth)
    assert process.passwords == passwords
    assert process.access.has_credentials == bool(passwords)


@pytest.mark.parametrize(
    ('clients', 'expected'),
    [
        (None, None),
        ('', None),
        ('127.0.0.1', ('127.0.0.1',)),
        ('127.0.0.1 10.0.0.0/8,localhost', ('127.0.0.1', '10.0.0.0/8', 'localhost')),
        (['localhost', ip_network('10.0.0.0/8')], ('localhost', '10.0.0.0/8')),
        (iter(['127.0.0.1']), ('127.0.0.1',)),
    ],
)
def test_clients(clients, expected):
    assert Process(clients=clients).clients == expected


@pytest.mark.parametrize('name', ['passwords', 'clients'])
def test_attributes_of_the_class(name):
    """They would hide the property, and protect nothing."""
    cls = type('Protected', (Process,), {name: {'user': 'secret'}})
    with pytest.raises(TypeError, match=f'Protected.{name} is a class attribute') as error:
        cls()
    assert 'secret' not in str(error.value)


def test_empty_attribute_of_the_class():
    """A subclass may declare it; the rules come from the arguments."""
    process = type('Declared', (Process,), {'passwords': None})(auth='user:password')
    assert process.access.users == {'user': 'password'}


def test_assigned_attributes(start, ask):
    """A subclass can set them before the start; what is enforced follows."""
    process = Process()
    process.passwords = {'alice': 'wonder'}
    process.clients = '127.0.0.1 10.0.0.1'
    assert process.passwords == {'alice': 'wonder'}
    assert process.clients == ('127.0.0.1', '10.0.0.1')
    with pytest.raises(ValueError, match='Bad client address'):
        process.clients = 'example.com'
    with pytest.raises(ValueError, match='Bad credentials'):
        process.passwords = 'alice'
    process = start(factory=lambda: process)
    assert ask(process, ['echo', 1], auth='alice:wonder') == [200, 1]
    assert ask(process, ['echo', 1])[0] == 401


def test_clients_after_users_that_were_changed(start, ask):
    """An assignment to `clients` does not bring back a user that was removed."""
    process = Process(auth='alice:wonder')
    process.passwords['bob'] = 'builder'
    del process.passwords['alice']
    process.clients = '127.0.0.1'
    process = start(factory=lambda: process)
    assert ask(process, ['echo', 1], auth='bob:builder') == [200, 1]
    assert ask(process, ['echo', 1], auth='alice:wonder')[0] == 401


ELSEWHERE = '192.0.2.1'
IN_PLACE = {
    'append': lambda clients: clients.append(ELSEWHERE),
    'remove': lambda clients: clients.remove('127.0.0.1'),
    'clear': lambda clients: clients.clear(),
    'item': lambda clients: clients.__setitem__(0, ELSEWHERE),
    'slice': lambda clients: clients.__setitem__(slice(None), [ELSEWHERE]),
}


class InPlace(Process):
    """Changes `clients` in place, before or after its setup."""

    moment = change = None

    def apply(self, moment):
        if self.moment == moment:
            IN_PLACE[self.change](self.clients)

    def setup(self):
        self.apply('before')
        super().setup()
        self.apply('after')


@pytest.mark.parametrize('moment', ['before', 'after'])
@pytest.mark.parametrize('change', IN_PLACE)
def test_clients_are_not_changed_in_place(moment, change):
    """The networks would not follow: such a process does not start."""
    process = InPlace(clients='127.0.0.1 10.0.0.1')
    process.moment, process.change = moment, change
    process.start()
    try:
        with pytest.raises((TypeError, AttributeError), match=r"^'tuple' object"):
            process.wait_ready()
    finally:
        process.stop()


class Extended(Process):
    """Extends `clients` by assignment, in its setup."""

    def setup(self):
        super().setup()
        self.clients += ('127.0.0.1',)


def test_clients_are_extended(start, ask):
    process = start(factory=Extended, clients=ELSEWHERE)
    assert ask(process, ['echo', 1]) == [200, 1]


def test_rules_are_read_only_in_the_owner(start, ask):
    """After the start, only the child has the rules that are followed."""
    process = Process(auth='alice:wonder', clients='127.0.0.1')
    process.passwords['bob'] = 'builder'
    process = start(factory=lambda: process)
    assert process.passwords == {'alice': 'wonder', 'bob': 'builder'}
    with pytest.raises(TypeError, match='does not support item assignment'):
        process.passwords['alice'] = 'other'
    with pytest.raises(AttributeError):
        process.passwords.pop('alice')
    with pytest.raises(AttributeError):
        process.clients.remove('127.0.0.1')
    assert ask(process, ['echo', 1], auth='bob:builder') == [200, 1]


class LateKeys(Process):
    """Assigns keys after its constructor, or in its setup."""

    def __init__(self, moment):
        super().__init__()
        self.keys = make_curve()
        self.moment = moment
        if moment == 'constructor':
            self.curve = self.keys

    def setup(self):
        if self.moment == 'setup':
            self.curve = self.keys
        super().setup()


@pytest.mark.parametrize('moment', ['constructor', 'setup'])
def test_keys_that_are_assigned(moment):
    """They would not be used: such a process does not start."""
    process = LateKeys(moment)
    process.start()
    try:
        with pytest.raises(ZMQStartError, match=r'LateKeys.curve comes too late, .* pass curve to'):
            process.wait_ready()
    finally:
        process.stop()


def test_keys_that_are_assigned_to_a_device():
    device = ThreadDevice()
    device.curve = make_curve()
    with pytest.raises(ZMQStartError, match='ThreadDevice.curve comes too late'):
        device.start()


class AttributeHandler(Handler):
    """Returns the attributes of its process."""

    def attributes(self, args):
        process = self.process
        return [200, [process.passwords, process.clients, process.auth_thread.is_alive()]]


class AttributeMessageHandler(MessageHandler):
    """Serves AttributeHandler."""

    handler = AttributeHandler


def test_attributes_after_a_reload(start, ask, tmp_path):
    users = tmp_path / 'users'
    users.write_text('alice:wonder\nbob:builder')
    process = start(auth=users, clients='localhost 10.0.0.0/8', handler=AttributeMessageHandler)
    clients = ['localhost', '10.0.0.0/8']

    def attributes():
        return ask(process, ['attributes', None], auth='bob:builder')[1]

    assert attributes() == [{'alice': 'wonder', 'bob': 'builder'}, clients, True]
    users.write_text('bob:builder')
    process.reload()
    wait_until(lambda: attributes() == [{'bob': 'builder'}, clients, True])
    assert ask(process, ['echo', 1], auth='alice:wonder')[0] == 401


def test_attributes_without_rules_after_a_reload(start, ask):
    process = start(handler=AttributeMessageHandler)
    process.reload()
    assert ask(process, ['attributes', None]) == [200, [None, None, True]]
    assert process.auth_thread is None  # in the parent


class StoppedAuthenticator(Process):
    """Stops its authenticator; from then on all connections are refused."""

    def setup(self):
        super().setup()
        assert self.auth_thread.is_alive()
        self.auth_thread.stop()
        assert not self.auth_thread.is_alive()


def test_authenticator_of_a_process(start, ask):
    process = start(factory=StoppedAuthenticator)
    assert ask(process, ['echo', 1], timeout=0.3)[0] in {401, 503}
