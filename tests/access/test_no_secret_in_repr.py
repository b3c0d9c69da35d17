# SPDX-License-Identifier: ZPL-2.1
"""No repr, text or error of this package contains a password or a secret key.

The classes are found in the modules: a new one that takes credentials and makes a text of itself
has to appear in `make_objects`.
"""

import asyncio
import gc
import importlib
import inspect
import logging
import pkgutil
import traceback
from contextlib import ExitStack, closing
from dataclasses import is_dataclass
from functools import partial

import msgspec
import pytest
import zmq
import zmq.auth
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError
from pyramid.request import Request, apply_request_extensions

import pyams_zmq
from checks import TIMEOUT
from handlers import MessageHandler
from peers import replying
from pyams_zmq import device
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.auth import Access, AccessPolicy, Authenticator, parse_users
from pyams_zmq.auth.rules import Rules
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.connection import ServiceAddress
from pyams_zmq.config import services_of
from pyams_zmq.config.identity import identify
from pyams_zmq.config.startup import make_supervisor
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.exceptions import ZMQRefusedError
from pyams_zmq.pool import ZMQPool
from pyams_zmq.pool.broker import PoolBroker
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_socket
from pyams_zmq.supervisor import Supervisor
from pyams_zmq.testing import JobRecorder, RecordedJob, Sent
from pyams_zmq.wire.message import encode_message

PASSWORD = 'hush-hush-hush'
SECRET_KEY = 'JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6'  # the example of zmq_curve(7)
PUBLIC = zmq.curve_public(SECRET_KEY.encode()).decode()
USER = f'editor:{PASSWORD}'
SECRETS = (PASSWORD, SECRET_KEY, SECRET_KEY[:20], SECRET_KEY[20:])

CREDENTIALS = {
    *('access', 'auth', 'credentials', 'curve', 'key', 'keys', 'options', 'password', 'passwords'),
    *('client_auth', 'client_curve', 'worker_auth', 'worker_curve', 'worker_access'),
    *('policy', 'secret', 'service', 'settings', 'users', 'body', 'data', 'envelope', 'header'),
}
"""Names of parameters and fields that may have a secret"""

NO_SECRETS = {
    ('Call', 'key'),  # the number of a call
    *(('Answer', name) for name in ('key', 'service')),  # a number, and the name of a service
    *(('Entry', 'service'), ('StoredEntry', 'key'), ('Waiting', 'service')),
    ('_Kind', 'options'),  # their names
}


def modules():
    """Import all modules of this package."""
    names = [module.name for module in pkgutil.walk_packages(pyams_zmq.__path__, 'pyams_zmq.')]
    return [importlib.import_module(name) for name in names if not name.endswith('__main__')]


CLASSES = sorted(
    {
        cls
        for module in modules()
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
    },
    key=lambda cls: (cls.__module__, cls.__qualname__),
)


def parameters(cls):
    """Return the names of the parameters of a class, and of the fields of a record."""
    try:
        names = set(inspect.signature(cls.__init__).parameters)
    except (TypeError, ValueError):
        names = set()
    return names | set(getattr(cls, '_fields', ())) | set(getattr(cls, '__struct_fields__', ()))


def is_record(cls):
    """Return True if the repr of a class shows its fields."""
    return is_dataclass(cls) or issubclass(cls, tuple) or hasattr(cls, '__struct_fields__')


def has_own_repr(cls):
    """Return True if a class of this package, or of a record, makes a text of its instances."""
    owners = [
        next(base for base in cls.__mro__ if name in vars(base))
        for name in ('__repr__', '__str__', '__format__')
    ]
    return is_record(cls) or any(owner.__module__.startswith('pyams_zmq') for owner in owners)


def assert_no_secret(text, where):
    for secret in SECRETS:
        assert secret not in text, where


def check_object(value):
    """Check all that can turn an object into a text."""
    for text in (repr(value), str(value), f'{value}', f'{value!r:.9999}', ascii(value)):
        assert_no_secret(text, type(value))


def make_curve():
    return CurveServer(SECRET_KEY, [PUBLIC]), CurveClient(PUBLIC, SECRET_KEY)


def make_registry():
    """Return the registry of an application with services of all kinds."""
    server, client = make_curve()
    settings = {
        'pyams_zmq.users.auth': USER,
        'pyams_zmq.keys.server_key': SECRET_KEY,
        'pyams_zmq.keys.client_keys': PUBLIC,
        'pyams_zmq.keys.client_key': SECRET_KEY,
        'pyams_zmq.keys.server_public_key': PUBLIC,
    }
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        for port, (name, options) in enumerate(
            {
                'users': {},
                'keys': {},
                'pool': {'workers': 1, 'worker_address': '127.0.0.1:9', 'worker_auth': USER},
                'code': {'curve': server, 'client_curve': client},
            }.items()
        ):
            address = f'127.0.0.1:{5000 + port}'
            config.add_zmq_process(name, handler=MessageHandler, address=address, **options)
    return config.registry


def make_objects(stack):
    """Return objects with secrets; what they refer to is checked, too."""
    server, client = make_curve()
    context = stack.enter_context(zmq.Context())
    registry = make_registry()
    stack.callback(registry.zmq_clients.close)
    request = Request.blank('/')
    request.registry = registry
    apply_request_extensions(request)
    services = services_of(registry)
    processes = [
        ZMQProcess('127.0.0.1', MessageHandler, auth=USER),
        ZMQProcess('127.0.0.1', MessageHandler, curve=server),
    ]
    pool = ZMQPool('127.0.0.1', MessageHandler, USER, worker_address='127.0.0.1', worker_auth=USER)
    configured = device.ThreadDevice(zmq.QUEUE, zmq.ROUTER, zmq.DEALER, auth=USER)
    configured.setsockopt_in(zmq.PLAIN_PASSWORD, PASSWORD.encode())
    rules = Rules(context, AccessPolicy(parse_users(USER), ()))
    rules.configure_plain('*', {'editor': PASSWORD})
    return [
        server,
        client,
        rules,
        Access(USER),
        Access(curve=server),
        ServiceAddress.parse('127.0.0.1:1', USER, None),
        ServiceAddress.parse('127.0.0.1:1', None, client),
        Authenticator(context, Access(USER)),
        services,
        make_supervisor(registry, services, identify(registry)),
        [service.make_process(registry) for service in services.values()],
        [request.zmq(name) for name in services],
        stack.enter_context(ZMQClient('127.0.0.1:1', auth=USER)),
        stack.enter_context(ZMQClient('127.0.0.1:1', curve=client)),
        stack.enter_context(closing(AsyncZMQClient('127.0.0.1:1', auth=USER))),
        stack.enter_context(zmq_socket('127.0.0.1:1', auth=USER)),
        processes,
        pool,
        PoolBroker(pool, 'ipc://local'),
        pool.make_worker('127.0.0.1:1'),
        PoolWorker('127.0.0.1:1', MessageHandler, auth=USER),
        RecordedJob(Sent('x', 'y', 1), {'key': PASSWORD}, JobRecorder(), None, 0),
        Supervisor({'one': partial(ZMQProcess, '127.0.0.1', MessageHandler, USER)}),
        configured,
        device.ProcessDevice(zmq.QUEUE, zmq.ROUTER, zmq.DEALER, curve=server),
        *[
            getattr(device, f'{kind}{name}')(zmq.ROUTER, zmq.DEALER, auth=USER)
            for name in ('Proxy', 'MonitoredQueue')
            for kind in ('', 'Thread', 'Process')
        ],
    ]


def reachable(roots):
    """Yield all objects of this package that can be reached from some objects."""
    seen, waiting = {}, [roots]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, (type, type(inspect), str, bytes, int)):
            continue
        seen[id(value)] = value
        if type(value).__module__.startswith('pyams_zmq'):
            yield value
        elif not (
            isinstance(value, (dict, list, tuple, set, frozenset, partial)) or callable(value)
        ):
            continue
        waiting += gc.get_referents(value)


def test_objects():
    """Whatever has credentials, or has what has them, does not show them."""
    with ExitStack() as stack:
        objects = make_objects(stack)
        seen = set()
        for value in reachable(objects):
            check_object(value)
            seen.update(type(value).__mro__)
        assert {Access, CurveServer, CurveClient, ServiceAddress} <= seen
        missing = [
            cls
            for cls in CLASSES
            if parameters(cls) & CREDENTIALS
            and has_own_repr(cls)
            and cls not in seen
            and not is_record(cls)
        ]
    assert not missing


def test_objects_in_use():
    """Those that exist while messages are sent, in the clients and in a thread of the server."""
    access = Access(USER)
    with ExitStack() as stack:
        address = stack.enter_context(replying(*[b'[200,1]'] * 3, policy=access, plain_server=True))
        client = stack.enter_context(ZMQClient(address, auth=USER, timeout=TIMEOUT))
        assert client.call('echo', PASSWORD) == 1
        client.send('echo', PASSWORD)
        wrong = stack.enter_context(ZMQClient(address, auth=f'editor:{PASSWORD}x'))
        with pytest.raises(ZMQRefusedError) as error:
            wrong.call('echo', PASSWORD)
        for value in reachable([client, wrong, access, error.value]):
            check_object(value)

        async def call():
            async with AsyncZMQClient(address, auth=USER) as client:
                assert await client.call('echo', PASSWORD) == 1
                for value in reachable([client]):
                    check_object(value)
                for task in asyncio.all_tasks():
                    check_object(task)

        asyncio.run(call())


@pytest.mark.parametrize(
    'cls', [cls for cls in CLASSES if is_record(cls)], ids=lambda cls: cls.__qualname__
)
def test_records(cls):
    """The field of a record that may have a secret is not in its repr."""
    names = {name for base in cls.__mro__ for name in vars(base).get('__annotations__', ())}
    values = {
        name: PASSWORD if name in CREDENTIALS and (cls.__name__, name) not in NO_SECRETS else 'x'
        for name in names
    }
    if issubclass(cls, msgspec.Struct):
        record = cls(**values)
    else:
        record = cls.__new__(cls, *['x' for _name in getattr(cls, '_fields', ())])
        if issubclass(cls, tuple):
            record = record._replace(**{name: values[name] for name in cls._fields})
        else:
            for name, value in values.items():
                object.__setattr__(record, name, value)
    check_object(record)


def test_check_finds_a_secret():
    with pytest.raises(AssertionError):
        check_object([PASSWORD])
    owner = type('Owner', (), {'__module__': 'pyams_zmq', 'auth': None})()
    owner.auth = Access(USER).users
    owner.self = partial(print, [owner])
    assert list(reachable({'key': (owner,)})) == [owner]


# Errors


def bad_curves():
    key = SECRET_KEY
    return [key[:-1], key + 'x', key + '.key', key + 'x.key_secret', key[:20], f'./{key}.key']


BAD = {
    'a password only': lambda folder: ZMQProcess('127.0.0.1', MessageHandler, auth=PASSWORD),
    'a long password': lambda folder: parse_users('x:' + PASSWORD * 30),
    'a mapping': lambda folder: parse_users({PASSWORD: 5}),
    'bytes': lambda folder: parse_users(USER.encode()),
    'a user twice': lambda folder: parse_users([USER, f'editor:x{PASSWORD}']),
    'a surrogate': lambda folder: parse_users(USER + '\ud800'),
    'a file': lambda folder: parse_users(write(folder / 'users', PASSWORD)),
    'a client': lambda folder: ZMQClient('127.0.0.1:1', auth=PASSWORD),
    'a socket': lambda folder: zmq_socket('127.0.0.1:1', auth=PASSWORD),
    'an asyncio client': lambda folder: AsyncZMQClient('127.0.0.1:1', auth=PASSWORD),
    'a user in the address': lambda folder: ZMQClient(f'{USER}@127.0.0.1:1'),
    'a user in a URI': lambda folder: zmq_socket(f'tcp://{USER}@127.0.0.1:1'),
    'a user in a pair': lambda folder: ZMQClient((f'{USER}@127.0.0.1', 1)),
    'a device': lambda folder: device.ThreadDevice(zmq.QUEUE, auth=PASSWORD),
    'a pool': lambda folder: ZMQPool('127.0.0.1', MessageHandler, worker_auth=PASSWORD),
    'rules': lambda folder: Rules(None, Access(USER)).configure_plain('*', PASSWORD),
    'rules without a domain': lambda folder: Rules(None, Access(USER)).configure_plain(
        {'editor': PASSWORD}
    ),
    'keys without a domain': lambda folder: Rules(None, Access()).configure_curve_callback(
        {'editor': SECRET_KEY}, type('Provider', (), {'callback': print})()
    ),
    'users as clients': lambda folder: Access(clients=USER),
    'several users as clients': lambda folder: Access(clients=[('editor', PASSWORD)]),
    'a user that is allowed': lambda folder: Rules(None, Access()).allow({'editor': PASSWORD}),
    'a user that is denied': lambda folder: Rules(None, Access()).deny(USER),
    'users as clients in settings': lambda folder: configure(clients=USER),
    'a message without a type': lambda folder: encode_message({'password': PASSWORD}, None),
    'keys and users': lambda folder: Access(USER, curve=make_curve()[0]),
    'an attribute': lambda folder: type('P', (ZMQProcess,), {'passwords': {'x': PASSWORD}})(
        '127.0.0.1', MessageHandler
    ),
    'a content': lambda folder: CurveServer(write(folder / 'x.key', SECRET_KEY), [PUBLIC]),
    'a settings file': lambda folder: configure(auth=PASSWORD),
    'a worker in settings': lambda folder: configure(worker_auth=PASSWORD, workers='1'),
    'a client in settings': lambda folder: configure(client_auth=PASSWORD),
    'a key in settings': lambda folder: configure(server_key=SECRET_KEY),
    'half a key in settings': lambda folder: configure(server_key=SECRET_KEY[:-1]),
    'a key of a client in settings': lambda folder: configure(client_key=SECRET_KEY),
    **{
        f'key {number} of {kind}': partial(lambda make, key, folder: make(key), make, key)
        for number, key in enumerate(bad_curves())
        for kind, make in {
            'a server': lambda key: CurveServer(key, [PUBLIC]),
            'a client': lambda key: CurveClient(PUBLIC, key),
            'a folder': lambda key: CurveServer(SECRET_KEY, key),
            'a list': lambda key: CurveServer(SECRET_KEY, [key]),
            'rules': lambda key: Rules(None, AccessPolicy({}, ())).configure_curve('*', key),
        }.items()
    },
}


def write(path, text):
    path.write_text(text)
    return path


def configure(**settings):
    """Declare a service in settings."""
    settings = {f'pyams_zmq.one.{key}': value for key, value in settings.items()}
    settings |= {'pyams_zmq.one.handler': 'handlers.MessageHandler'}
    with Configurator(settings=settings | {'pyams_zmq.one.address': '127.0.0.1:5000'}) as config:
        config.include('pyams_zmq')


@pytest.mark.parametrize('name', BAD)
def test_errors(name, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ValueError, TypeError, ConfigurationError)) as caught:
        BAD[name](tmp_path)
    lines = traceback.format_exception(caught.value)
    # Without the lines of the sources, some of which are those of this test.
    text = ''.join(line for line in lines if not line.startswith('  File '))
    assert_no_secret(text + repr(caught.value) + str(caught.value) + caplog.text, name)
