# SPDX-License-Identifier: ZPL-2.1
"""Declared services: directive, settings, clients of requests."""

import os
import signal
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import zmq.auth
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationError
from pyramid.registry import Registry
from pyramid.request import Request
from pyramid.response import Response
from pyramid.scripting import prepare

import plain_handlers
from checks import TIMEOUT
from handlers import Handler, Journal, MessageHandler, Process
from pyams_zmq.config import services_of, startup
from pyams_zmq.config.identity import Application
from pyams_zmq.config.startup import is_server
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.exceptions import ZMQClosedError, ZMQRemoteError, ZMQStartError
from pyams_zmq.interfaces import IZMQClientFactory, IZMQService
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.socket_lock import SocketLock

SECRET = 'JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6'  # the example of zmq_curve(7)
PUBLIC = zmq.curve_public(SECRET.encode()).decode()
KEYS = CurveServer(SECRET, [PUBLIC])
CLIENT_KEYS = CurveClient(PUBLIC, SECRET)
ADDRESS = '127.0.0.1:5555'
HANDLER = 'handlers.MessageHandler'


def make_process(*args):
    """Make a process, as a `factory` does of which only a call shows what it makes."""
    return ZMQProcess(*args)


def make_config(*services, **settings):
    """An application with services."""
    config = Configurator(
        settings={key.replace('__', '.'): value for key, value in settings.items()}
    )
    config.include('pyams_zmq')
    for name, options in services:
        config.add_zmq_process(name, **options)
    return config


def service_of(*services, **settings):
    """The service that such an application declares as `indexer`."""
    config = make_config(*services, **settings)
    config.commit()
    return config.registry.getUtility(IZMQService, name='indexer')


@pytest.mark.parametrize('handler', [MessageHandler, HANDLER])
def test_directive(handler):
    service = service_of(('indexer', {'handler': handler, 'address': ADDRESS}))
    assert (service.name, service.address, service.handler) == ('indexer', ADDRESS, MessageHandler)
    assert (service.factory, service.start, service.timeout) == (ZMQProcess, 'auto', 10)


def test_settings():
    service = service_of(
        pyams_zmq__indexer__address=ADDRESS,
        pyams_zmq__indexer__handler=HANDLER,
        pyams_zmq__indexer__factory='handlers.Process',
        pyams_zmq__indexer__start='external',
        pyams_zmq__indexer__auth='',
        pyams_zmq__indexer__clients='127.0.0.1 10.0.0.0/8',
        pyams_zmq__indexer__timeout='2.5',
        pyams_zmq__indexer__drain_timeout='120',
        pyams_zmq__indexer__max_message_size='1000',
        pyams_zmq__indexer__concurrency='8',
    )
    assert (service.factory, service.start, service.timeout) == (Process, 'external', 2.5)
    process = service.make_process(None)
    assert isinstance(process, Process)
    assert (process.bind_addr, process.handler) == (ADDRESS, MessageHandler)
    assert (process.drain_timeout, process.max_message_size) == (120.0, 1000)
    assert process.concurrency == 8
    assert len(process.clients) == 2
    assert not process.passwords


@pytest.mark.parametrize(
    ('key', 'value', 'expected'),
    [
        ('max_memory', '300.5', 300.5),
        ('max_memory', '300', 300.0),
        ('overdue_grace', '2.5', 2.5),
        ('queue_limit', '5', 5),
        ('beat_interval', '0.25', 0.25),
        ('stats_users', 'admin\nmonitor', ('admin', 'monitor')),
    ],
)
def test_limits_of_a_pool(key, value, expected):
    service = service_of(
        ('indexer', {'handler': HANDLER, 'address': ADDRESS, 'workers': 2}),
        **{f'pyams_zmq__indexer__{key}': value},
    )
    process = service.make_process(None)
    assert isinstance(process, ZMQPool)
    assert getattr(process, key) == expected


@pytest.mark.parametrize(
    ('mib', 'options', 'expected'),
    [
        ('', {}, 16),
        (1, {}, 1),
        (64, {}, 64),
        ('', {'start': 'never'}, 32),
        (64, {'start': 'never'}, 64),
        ('', {'factory': type('Large', (ZMQProcess,), {'max_message_size': 20 << 20})}, 20),
        ('', {'factory': make_process}, 32),
    ],
)
def test_client_may_send_what_its_service_takes(mib, options, expected):
    """A message that is larger is refused where it is sent: its sender may not see the reply."""
    service = service_of(
        ('indexer', {'handler': HANDLER, 'address': ADDRESS, **options}),
        pyams_zmq__indexer__max_message_size=mib and mib << 20,
    )
    with service.make_client() as client:
        assert client.max_message_size == expected << 20


@pytest.mark.parametrize(('value', 'expected'), [('yes', True), ('True', True), ('off', False)])
def test_boolean_setting(value, expected):
    """The words are those of :func:`pyramid.settings.asbool`."""
    service = service_of(
        ('indexer', {'handler': HANDLER, 'address': ADDRESS}),
        pyams_zmq__indexer__send_deadline=value,
    )
    assert service.send_deadline is expected


def test_settings_override_code():
    service = service_of(
        ('indexer', {'handler': HANDLER, 'address': ADDRESS, 'timeout': 5, 'drain_timeout': 1}),
        pyams_zmq__indexer__address='127.0.0.1:6666',
        pyams_zmq__indexer__drain_timeout='2',
    )
    assert (service.address, service.timeout) == ('127.0.0.1:6666', 5)
    assert service.make_process(None).drain_timeout == 2


def test_several():
    config = make_config(
        ('indexer', {'handler': HANDLER, 'address': ADDRESS}),
        ('converter', {'handler': HANDLER, 'address': 'ipc://@converter', 'start': 'never'}),
        pyams_zmq__scheduler__address='127.0.0.1:7777',
        pyams_zmq__scheduler__start='never',
    )
    config.commit()
    assert sorted(services_of(config.registry)) == ['converter', 'indexer', 'scheduler']


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'handler': 42}, 'bad handler .*42 is not a class'),
        ({'handler': 'no.such'}, "bad handler .*'no.such' cannot be imported .No module"),
        ({'handler': 'plain_handlers'}, 'bad handler .*is not a class of the application'),
        ({'handler': 'plain_handlers.Polite'}, 'bad handler .*needs arguments .*pass an instance'),
        ({'handler': 'plain_handlers.BadTimeout', 'start': 'never'}, 'bad handler .*timeout -1'),
        (
            {'handler': 'plain_handlers.AsyncRequest', 'concurrency': 2},
            'bad handler .*leave concurrency at 1',
        ),
        ({'factory': None}, 'bad factory .*None is not a class'),
        ({'address': 'a b'}, "bad address .*'a b'"),
        ({'address': 'ipc://*'}, "bad address .*'ipc://.' has no path"),
        ({'address': 'lo:5555'}, "bad address .*'lo' is not an IP address"),
        ({'address': '127.0.0.1'}, "bad address .*'127.0.0.1' has no port"),
        (
            {'start': 'later'},
            "bad start .*'later' is not allowed; write auto, external or never; or true for auto, "
            'false for never',
        ),
        ({'timeout': 'x'}, "bad timeout .*'x' is not allowed. Expected `float`, got `str`"),
        ({'timeout': 'nan'}, r"bad timeout .*'nan' is not allowed. Expected `float` > 0\.0"),
        ({'timeout': 0}, r'bad timeout .*0 is not allowed. Expected `float` > 0\.0'),
        ({'retries': -1}, 'bad retries .*-1 is not allowed. Expected `int` >= 0'),
        ({'retries': 1.5}, 'bad retries .*1.5 is not allowed. Expected `int`'),
        ({'workers': '-1'}, "bad workers .*'-1' is not allowed. Expected `int` >= 0"),
        ({'send_deadline': 'maybe'}, "bad send_deadline .*'maybe' is not allowed. Expected `bool`"),
        ({'backlog': 'x'}, "bad backlog .*'x' is not allowed. Expected `int`"),
        ({'drain_timeout': -5}, r'bad drain_timeout .*-5 is not allowed. Expected `float` >= 0\.0'),
        ({'drain_timeout': 'inf'}, r'bad drain_timeout .*Expected `float` <= 100000000\.0'),
        ({'bind_timeout': 'nan'}, "bad bind_timeout .*'nan' is not allowed"),
        ({'max_message_size': -1}, 'bad max_message_size .*Expected `int` >= 0'),
        ({'ipc_mode': '999'}, r"bad ipc_mode \(.*\): '999' is not a file mode"),
        ({'ipc_mode': 660}, 'bad ipc_mode .*: 660 is not a file mode: write octal digits'),
        ({'ipc_group': 'no such'}, "bad ipc_group .*: 'no such' is not a group of this machine"),
        ({'concurrency': 0}, 'bad concurrency .*0 is not allowed. Expected `int` >= 1'),
        ({'beat_interval': 0}, r'bad beat_interval .*Expected `float` >= 0\.01'),
        ({'stats_users': [1]}, r'bad stats_users .*\[1\] is not allowed'),
        ({'auth': 'secret'}, 'bad auth .*write auth='),
        ({'auth': 'a:b', 'curve': KEYS}, 'bad auth .*Give auth or curve: a socket has one'),
        ({'curve': SECRET}, 'bad curve .*: It cannot be imported; write an object with keys, '),
        ({'curve': ADDRESS}, 'bad curve .*: It cannot be imported'),
        ({'curve': 'test_config.ADDRESS'}, 'bad curve .*: Bad curve, a str: pass a CurveServer'),
        (
            {'client_curve': KEYS},
            'bad client_curve .*: Bad curve, a CurveServer: pass a CurveClient',
        ),
        (
            {'worker_auth': 'a:b', 'worker_curve': KEYS, 'worker_address': ADDRESS, 'workers': 1},
            'bad worker_auth .*Give auth or curve',
        ),
        ({'worker_auth': 'secret'}, 'bad worker_auth .*write auth='),
        ({'client_auth': 'secret'}, 'bad client_auth .*write auth='),
        (
            {'client_auth': 'a:b', 'client_curve': CLIENT_KEYS},
            'bad client_auth .*A client connects as one user, or with CURVE keys',
        ),
        ({'client_auth': 'a:b\nc:d'}, 'bad client_auth .*A client connects as one user'),
        ({'clients': 'host'}, "bad clients .*'host'"),
        (
            {'factory': plain_handlers.Plain},
            'bad factory .*Plain.* is not a subclass of ZMQProcess; the class with the methods is',
        ),
        ({'adress': ADDRESS}, r'unknown option adress; did you mean address\?'),
        ({'xyz': 1}, 'unknown option xyz; write OPTION with one of these: address, auth, '),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ConfigurationError, match=text) as error:
        service_of(('indexer', {'handler': HANDLER, 'address': ADDRESS, **options}))
    assert 'secret' not in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ('handler', 'found'),
    [
        ('plain_handlers.Plain', plain_handlers.Plain),
        ('plain_handlers.POLITE', plain_handlers.POLITE),
        ('plain_handlers.decorated_factory', plain_handlers.decorated_factory),
    ],
)
@pytest.mark.parametrize('workers', ['0', '2'])
def test_plain_handler_in_settings(handler, found, workers):
    service = service_of(
        pyams_zmq__indexer__address=ADDRESS,
        pyams_zmq__indexer__handler=handler,
        pyams_zmq__indexer__workers=workers,
    )
    assert service.handler is found
    assert service.make_process(Registry('one')).handler is found


def test_no_handler_is_needed_elsewhere():
    options = {'address': ADDRESS, 'start': 'never'}
    for given in ({}, {'handler': None}):
        assert service_of(('indexer', {**options, **given})).handler is None


def test_concurrency_of_the_factory():
    """It counts where the options do not give one."""

    class Eager(ZMQProcess):
        concurrency = 2

    options = {'handler': 'plain_handlers.AsyncRequest', 'address': ADDRESS, 'factory': Eager}
    with pytest.raises(ConfigurationError, match='leave concurrency at 1'):
        service_of(('indexer', options))
    service_of(('indexer', {**options, 'concurrency': 1}))


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ({'handler': HANDLER}, "'indexer' has no address: .* or set pyams_zmq.indexer.address"),
        ({'address': ADDRESS}, "'indexer' has no handler: .* or set pyams_zmq.indexer.handler"),
        (
            {'address': ADDRESS, 'handler': None},
            "'indexer' has no handler: .* or set pyams_zmq.indexer.handler",
        ),
    ],
)
def test_missing_options(options, text):
    with pytest.raises(ConfigurationError, match=text):
        service_of(('indexer', options))


@pytest.mark.parametrize(
    ('key', 'value', 'text'),
    [
        (
            'pyams_zmq.indexer.Adress',
            ADDRESS,
            r"'pyams_zmq\.indexer\.Adress': did you mean pyams_zmq\.indexer\.address\?",
        ),
        (
            'pyams_zmq.indexer.xyz',
            1,
            'write pyams_zmq.indexer.OPTION with one of these: address, auth, ',
        ),
        ('pyams_zmq.aplication', 'shop', r'did you mean pyams_zmq\.application\?'),
        ('pyams_zmq.indexer', ADDRESS, "Unknown setting 'pyams_zmq.indexer'"),
        ('pyams_zmq.a.b.address', ADDRESS, "Unknown setting 'pyams_zmq.a.b.address'"),
        (
            'pyams_zmq.index er.address',
            ADDRESS,
            r"Bad name of a ØMQ process 'index er': .* \(setting 'pyams_zmq\.index er\.address'\)",
        ),
        (
            'pyams_zmq.index er.adress',
            ADDRESS,
            "Unknown setting 'pyams_zmq.index er.adress': write ",
        ),
        ('pyams_zmq..address', ADDRESS, "Bad name of a ØMQ process ''"),
        ('pyams_zmq.indexer.start', 'later', r'bad start \(setting pyams_zmq.indexer.start\)'),
        ('pyams_zmq.indexer.client_keys', PUBLIC, 'has client_keys but no server_key: set '),
        ('pyams_zmq.indexer.server_public_key', PUBLIC, 'server_public_key but no client_key'),
        ('pyams_zmq.indexer.server_key', 'hush', 'has server_key but no client_keys: set '),
        ('pyams_zmq.indexer.client_key', 'hush', 'client_key but no server_public_key: set '),
    ],
)
def test_bad_settings(key, value, text):
    config = make_config(('indexer', {'handler': HANDLER, 'address': ADDRESS}))
    config.add_settings({key: value})
    with pytest.raises(ConfigurationError, match=text) as error:
        config.commit()
    assert 'hush' not in str(error.value)


def test_setting_that_is_added_after_a_commit():
    config = make_config()
    config.commit()
    config.add_settings({'pyams_zmq.indexer.adress': ADDRESS})
    config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS)
    with pytest.raises(ConfigurationError, match=r"Unknown setting 'pyams_zmq\.indexer\.adress'"):
        config.commit()


@pytest.mark.parametrize('way', ['autocommit', 'commit'])
def test_settings_override_code_that_comes_later(way):
    config = Configurator(
        settings={'pyams_zmq.indexer.timeout': '3'}, autocommit=way == 'autocommit'
    )
    config.include('pyams_zmq')
    config.commit()
    config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS, start='never')
    config.commit()
    assert services_of(config.registry)['indexer'].timeout == 3
    config.make_wsgi_app()


def test_settings_of_an_undeclared_service():
    config = make_config(pyams_zmq__indexer__address=ADDRESS)
    with pytest.raises(ConfigurationError, match=r"'indexer' has no handler: set pyams_zmq\.index"):
        config.make_wsgi_app()


def test_options_of_clients():
    service = service_of(
        ('indexer', {'handler': HANDLER, 'address': ADDRESS, 'retries': 2}),
        pyams_zmq__indexer__send_deadline='true',
    )
    with service.make_client() as client:
        assert (client.retries, client.send_deadline) == (2, True)


def test_bad_name():
    with pytest.raises(ConfigurationError, match='Bad name of a ØMQ process None'):
        make_config((None, {}))


def test_conflict():
    config = make_config()
    config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS)
    config.add_zmq_process('indexer', handler=HANDLER, address='127.0.0.1:6666')
    with pytest.raises(ConfigurationConflictError) as error:
        config.commit()
    assert str(error.value).count('config.add_zmq_process') == 2


OTHER = {'handler': HANDLER, 'address': '127.0.0.1:6666'}
WORKERS = {'workers': 1, 'worker_auth': 'worker:secret'}


@pytest.mark.parametrize(
    ('one', 'two'),
    [
        ({'address': ADDRESS}, {'address': ('127.0.0.1', 5555)}),
        ({'address': ADDRESS}, {'address': '*:5555', 'start': 'external'}),
        ({'address': 'ipc:///tmp/one'}, {'address': 'ipc:///tmp/../tmp/one'}),
        ({'address': ADDRESS}, {**OTHER, **WORKERS, 'worker_address': '0.0.0.0:5555'}),
        ({**OTHER, **WORKERS, 'worker_address': ADDRESS}, {'address': ADDRESS}),
    ],
)
def test_two_services_at_one_address(one, two):
    config = make_config(('one', {'handler': HANDLER, **one}), ('two', {'handler': HANDLER, **two}))
    with pytest.raises(ConfigurationError, match="'one' and 'two' cannot both bind"):
        config.commit()


@pytest.mark.parametrize(
    'two',
    [
        {'address': '[::1]:5555'},
        {'address': '127.0.0.2:5555'},
        {'address': '127.0.0.1:5556'},
        {'address': 'ipc:///127.0.0.1:5555'},
        {'address': ADDRESS, 'start': 'never'},  # another client of the same service
    ],
)
def test_two_services_at_two_addresses(two):
    one = {'handler': HANDLER, 'address': ADDRESS}
    make_config(('one', one), ('two', {'handler': HANDLER, **two})).commit()


def test_pool_with_one_address():
    options = {'handler': HANDLER, 'address': ADDRESS, **WORKERS, 'worker_address': '*:5555'}
    with pytest.raises(ConfigurationError, match=r"'one' cannot bind tcp://\*:5555 twice"):
        make_config(('one', options)).commit()


def test_service_that_moves():
    """A later declaration of a service replaces the former one, also at its address."""
    config = make_config(('one', {'handler': HANDLER, 'address': ADDRESS}))
    config.commit()
    config.add_zmq_process('one', handler=HANDLER, address=ADDRESS, start='external')
    config.commit()
    assert services_of(config.registry)['one'].start == 'external'


def test_application_overrides_a_package():
    config = make_config()
    config.include(
        lambda config: config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS),
        'package',
    )
    config.add_zmq_process('indexer', handler=HANDLER, address='127.0.0.1:6666')
    config.commit()
    assert services_of(config.registry)['indexer'].address == '127.0.0.1:6666'


def test_introspection():
    config = make_config(('indexer', {'handler': HANDLER, 'address': ADDRESS, 'auth': 'a:secret'}))
    config.commit()
    [item] = config.introspector.get_category('ZMQ processes')
    assert item['introspectable']['address'] == ADDRESS
    assert 'secret' not in str(dict(item['introspectable']))
    assert 'secret' not in repr(services_of(config.registry)['indexer'])


def test_keys_in_settings(tmp_path, start):
    (tmp_path / 'clients').mkdir()
    zmq.auth.create_certificates(tmp_path, 'server')
    zmq.auth.create_certificates(tmp_path / 'clients', 'webapp')
    service = service_of(
        pyams_zmq__indexer__address=f'ipc://{tmp_path}/zmq.sock',
        pyams_zmq__indexer__handler=HANDLER,
        pyams_zmq__indexer__server_key=f'{tmp_path}/server.key_secret',
        pyams_zmq__indexer__client_keys=f'{tmp_path}/clients',
        pyams_zmq__indexer__server_public_key=f'{tmp_path}/server.key',
        pyams_zmq__indexer__client_key=f'{tmp_path}/clients/webapp.key_secret',
    )
    start(factory=lambda: service.make_process(None))
    with service.make_client() as client:
        assert client.call('who', 1)[0] == service.client_curve.public.decode()


@pytest.mark.parametrize(
    ('address', 'target'),
    [
        ('*:5555', 'tcp://127.0.0.1:5555'),
        ('0.0.0.0:5555', 'tcp://127.0.0.1:5555'),
        ('[::]:5555', 'tcp://[::1]:5555'),
        ('localhost:5555', 'tcp://127.0.0.1:5555'),
        ('10.0.0.1:5555', 'tcp://10.0.0.1:5555'),
        ('ipc://@name', 'ipc://@name'),
    ],
)
def test_address_of_clients(address, target):
    """Clients connect to the address that the process binds."""
    service = service_of(('indexer', {'handler': HANDLER, 'address': address}))
    assert service.client_address == target
    with service.make_client() as client:
        assert client.address == target


# Requests


@pytest.fixture
def application(start, tmp_path):
    """Configuration with a service that runs."""
    address = f'ipc://{tmp_path}/zmq.sock'
    start(address, auth='webapp:secret')
    config = make_config(
        (
            'indexer',
            {'handler': HANDLER, 'address': address, 'auth': 'webapp:secret', 'start': 'external'},
        )
    )

    def view(request):
        return request.zmq('indexer').call('echo', request.params['text'])

    config.add_route('echo', '/echo')
    config.add_view(view, route_name='echo', renderer='json')
    yield config
    config.registry.zmq_clients.close()


def test_call_from_a_view(application):
    app = application.make_wsgi_app()
    for text in ('a', 'b'):
        assert Request.blank(f'/echo?text={text}').get_response(app).json == text


def test_unknown_service(application):
    app = application.make_wsgi_app()
    request = Request.blank('/')
    request.registry = app.registry
    with pytest.raises(LookupError, match="Unknown ØMQ service 'other'; declared: indexer"):
        app.registry.zmq_clients.get('other')


def test_one_client_for_each_service(application):
    application.commit()
    clients = application.registry.zmq_clients
    assert clients.get('indexer') is clients.get('indexer')


def test_fork_while_another_thread_makes_a_client(application):
    """The child, a worker of a preforking server, does not wait for the lock of that thread."""
    is_inside, may_go = threading.Event(), threading.Event()

    def make(service):
        is_inside.set()
        may_go.wait()
        return service.make_client()

    application.commit()
    registry = application.registry
    registry.registerUtility(make, IZMQClientFactory)
    thread = threading.Thread(target=registry.zmq_clients.get, args=('indexer',))
    thread.start()
    is_inside.wait()
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # of pytest-timeout
        signal.alarm(TIMEOUT)
        may_go.set()
        registry.zmq_clients.get('indexer')
        os._exit(0)
    may_go.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0


# Monitor


def test_monitor(start, tmp_path):
    start(f'ipc://{tmp_path}/zmq.sock')
    config = Configurator(
        settings={
            'pyams_zmq.indexer.address': f'ipc://{tmp_path}/zmq.sock',
            'pyams_zmq.indexer.start': 'never',
            'pyams_zmq.converter.address': f'ipc://{tmp_path}/down',
            'pyams_zmq.converter.start': 'never',
            'pyams_zmq.unreadable.address': ADDRESS,
            'pyams_zmq.unreadable.start': 'never',
        }
    )
    for package in ('pyams_zmq', 'cornice', 'cornice_swagger', 'pyams_utils'):
        config.include(package)
    users = tmp_path / 'users'
    users.write_text('user:password')
    config.add_zmq_process('unreadable', auth=users)
    app = config.make_wsgi_app()
    users.unlink()
    answer = Request.blank('/api/rest/monitor').get_response(app).json
    app.registry.zmq_clients.close()
    down, up, unreadable = answer['services']
    assert answer['status'] == 'PARTIAL'
    assert up == {'handler': 'pyams_zmq: indexer', 'status': 'UP'}
    assert (down['handler'], down['status']) == ('pyams_zmq: converter', 'DOWN')
    assert 'No service has answered' in down['message']
    assert (unreadable['handler'], unreadable['status']) == ('pyams_zmq: unreadable', 'DOWN')
    assert 'Credentials file' in unreadable['message']


# Testing


def test_include_testing():
    config = Configurator()
    config.include('pyams_zmq.testing')
    config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS)

    def view(request):
        request.zmq('indexer').send('echo', 'sent')
        return request.zmq('indexer').call('echo', 'called')

    config.add_route('home', '/')
    config.add_view(view, route_name='home', renderer='json')
    app = config.make_wsgi_app()
    testing = app.registry.zmq_testing
    assert Request.blank('/').get_response(app).json is None
    assert testing.outbox == [('indexer', 'echo', 'sent'), ('indexer', 'echo', 'called')]
    testing.replies['indexer']['echo'] = [200, 'given']
    assert Request.blank('/').get_response(app).json == 'given'
    testing.replies['indexer'] = {'echo': [200, 'given later']}
    assert Request.blank('/').get_response(app).json == 'given later'


def test_include_testing_eager():
    config = Configurator()
    config.include('pyams_zmq.testing')
    config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS)
    config.commit()
    config.registry.zmq_testing.eager = True
    client = config.registry.zmq_clients.get('indexer')
    assert client.call('echo', 'here') == 'here'
    with pytest.raises(ZMQRemoteError, match='404'):
        client.call('unknown')
    config.registry.zmq_testing.eager = False
    assert client.call('echo', 'here') is None


def test_include_testing_by_setting():
    config = Configurator(settings={'pyramid.includes': 'pyams_zmq.testing'})
    config.include('pyams_zmq')
    config.add_zmq_process('indexer', handler=HANDLER, address=ADDRESS)
    config.make_wsgi_app().registry.zmq_clients.get('indexer').call('echo', 'called')
    assert config.registry.zmq_testing.outbox == [('indexer', 'echo', 'called')]


# With transactions


class Eager(Handler):
    """Has a method that uses a transaction."""

    def work(self, args, *, request):
        request.tm.get().join(Journal(request.tm, args))
        return [200, None]


class EagerMessageHandler(MessageHandler):
    """Serves Eager."""

    handler = Eager


@pytest.fixture(params=['implicit', 'explicit'])
def tested(request):
    """Application with pyramid_tm, whose messages are recorded."""
    hook = 'pyramid_tm.explicit_manager' if request.param == 'explicit' else ''
    config = Configurator(settings={'tm.manager_hook': hook} if hook else {})
    config.include('pyramid_tm')
    config.include('pyams_zmq.testing')
    config.add_zmq_process('indexer', handler=EagerMessageHandler, address=ADDRESS)
    config.commit()
    return config


def test_send_where_there_is_no_transaction(tested):
    """A finished callback has none; an exception view has one, which is aborted."""

    def fail(request):
        request.zmq('indexer').send('lost', 1)
        raise ValueError

    def call_back(request):
        request.add_finished_callback(lambda request: request.zmq('indexer').send('finished', 1))
        request.zmq('indexer').send('kept', 1)
        return Response()

    def alarm(error, request):
        request.zmq('indexer').send('lost', 2)
        request.zmq('indexer').call('alarm', 1)
        return Response(status=500)

    tested.add_exception_view(alarm, context=ValueError)
    for view in (fail, call_back):
        tested.add_route(view.__name__, view.__name__)
        tested.add_view(view, route_name=view.__name__)
    app = tested.make_wsgi_app()
    for _ in range(2):
        assert Request.blank('/fail').get_response(app).status_code == 500
        assert Request.blank('/call_back').get_response(app).status_code == 200
    types = [sent.type for sent in app.registry.zmq_testing.outbox]
    assert types == ['alarm', 'kept', 'finished'] * 2


def test_send_in_a_script(tested):
    with prepare(registry=tested.registry) as env:
        request = env['request']
        with request.tm:
            request.zmq('indexer').send('first', 1)
            assert not tested.registry.zmq_testing.outbox
        with pytest.raises(ZeroDivisionError), request.tm:
            _ = request.zmq('indexer').send('lost', 1), 1 / 0
        request.zmq('indexer').send('now', 1)
    assert [sent.type for sent in tested.registry.zmq_testing.outbox] == ['first', 'now']


def test_eager_handler_has_a_transaction_of_its_own(tested, tmp_path):
    tested.registry.zmq_testing.eager = True
    own, other = tmp_path / 'own', tmp_path / 'other'

    def view(request):
        request.tm.get().join(Journal(request.tm, own))
        request.zmq('indexer').call('work', str(other))
        assert other.read_text() == 'commit\n'
        request.zmq('indexer').send('work', str(other))
        return Response()

    tested.add_route('home', '/')
    tested.add_view(view, route_name='home')
    assert Request.blank('/').get_response(tested.make_wsgi_app()).status_code == 200
    assert own.read_text() == 'commit\n'
    assert other.read_text() == 'commit\n' * 2


def test_include_testing_late(tmp_path):
    config = make_config(('indexer', {'handler': HANDLER, 'address': ADDRESS}))
    config.commit()
    real = config.registry.zmq_clients.get('indexer')
    config.include('pyams_zmq.testing')
    config.commit()
    testing = config.registry.zmq_testing
    config.registry.zmq_clients.get('indexer').call('echo')
    config.include('pyams_zmq.testing')
    config.commit()
    assert config.registry.zmq_testing is testing
    assert len(testing.outbox) == 1
    with pytest.raises(ZMQClosedError):
        real.call('echo')


# Start


@pytest.mark.parametrize(
    ('script', 'serves'), [('pserve', True), ('prequest', False), ('pshell', False)]
)
def test_scripts_of_pyramid(monkeypatch, script, serves):
    module = f'pyramid.scripts.{script}'
    for names in (
        {'__name__': module},
        {'__name__': '__main__', '__spec__': SimpleNamespace(name=module)},
    ):
        scope = {'is_server': is_server, **names}
        exec('answer = is_server()', scope)
        assert scope['answer'] == serves


@pytest.mark.parametrize(
    ('options', 'drain'),
    [({}, 30), ({'drain_timeout': 120}, 130), ({'factory': 'handlers.PatientProcess'}, 70)],
)
def test_supervisor_waits_for_its_process(options, drain):
    services = [
        replace(
            service_of(('indexer', {'handler': HANDLER, 'address': ADDRESS, **more})), name=name
        )
        for name, more in (('indexer', options), ('other', {}))
    ]
    assert supervisor_of(*services).drain_timeout == drain


def supervisor_of(*services, application='one'):
    """Return the supervisor of services in an application."""
    return startup.make_supervisor(
        Registry('one'),
        {service.name: service for service in services},
        Application(application, application.upper()),
    )


def test_lock(tmp_path, monkeypatch):
    """Workers of one application share a lock; others, services and addresses have another one."""
    locks, addresses = set(), set()
    for folder in (tmp_path, tmp_path / 'other'):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        for key in ('one', 'two'):
            for address in ('ipc://zmq.sock', ADDRESS):
                service = service_of(('indexer', {'handler': HANDLER, 'address': address}))
                first, second = (supervisor_of(service, application=key) for _worker in range(2))
                assert first.lock == second.lock
                locks.add(first.lock)
                addresses.add(first.address_locks['indexer'].address)
    assert len(locks) == 6
    assert addresses == {
        f'ipc://{tmp_path}/zmq.sock',
        f'ipc://{tmp_path}/other/zmq.sock',
        f'tcp://{ADDRESS}',
    }


def test_lock_of_several_services():
    """Two deployments whose addresses differ in one service have locks of their own."""
    indexer = service_of(('indexer', {'handler': HANDLER, 'address': ADDRESS}))
    pools = [
        replace(indexer, name='digest', address=f'127.0.0.1:555{digit}', factory=ZMQPool, workers=2)
        for digit in (1, 2)
    ]
    first, second = (supervisor_of(indexer, pool) for pool in pools)
    assert first.name == 'pyams_zmq supervisor'
    assert first.lock == f'one services digest tcp://127.0.0.1:5551 indexer tcp://{ADDRESS}'
    assert first.lock == supervisor_of(pools[0], indexer).lock
    assert len({first.lock, second.lock, supervisor_of(indexer).lock}) == 3
    assert first.address_locks['digest'].address == 'tcp://127.0.0.1:5551'
    assert list(first.factories) == ['indexer', 'digest']


def test_process_of_a_supervisor():
    options = {'handler': HANDLER, 'address': ADDRESS}
    for more, is_pool in (({}, False), ({'workers': 2}, True)):
        supervisor = supervisor_of(service_of(('indexer', {**options, **more})))
        process = supervisor.factories['indexer']()
        assert isinstance(process, ZMQPool) == is_pool
        assert process.name == 'indexer'
        assert getattr(process, 'retries_start', False) == is_pool


def test_lock_without_a_folder(lock_folder):
    """Each service has a lock of its own, and the application another one."""
    lock_folder.touch()
    service = service_of(('indexer', {'handler': HANDLER, 'address': ADDRESS}))
    supervisor = supervisor_of(service)
    own = supervisor.address_locks['indexer']
    assert isinstance(supervisor.name_lock, SocketLock)
    assert isinstance(own, SocketLock)
    assert supervisor.name_lock.acquire()
    assert own.acquire()
    for each in (supervisor.name_lock, own):
        each.release()


def test_error_of_the_start_names_all_services(monkeypatch):
    def fail(self):
        raise ZMQStartError('it cannot be started')

    monkeypatch.setattr(startup.SupervisorProcess, 'start', fail)
    config = make_config(
        *((name, {'handler': HANDLER, 'address': f'ipc://@{name}'}) for name in ('one', 'two'))
    )
    with pytest.raises(ZMQStartError) as caught:
        config.make_wsgi_app()
    assert str(caught.value) == (
        "it cannot be started; for the ØMQ processes 'one', 'two': set pyams_zmq.one.start = "
        'external, pyams_zmq.two.start = external, and run "pyams_zmq serve INI one two"'
    )


@pytest.mark.parametrize('name', ['pyams_zmq', '/usr/bin/pyams_upgrade'])
def test_programs_that_do_not_serve(monkeypatch, name):
    assert is_server()
    monkeypatch.setattr(sys, 'argv', [name])
    assert not is_server()


def test_options_of_the_socket_file():
    service = service_of(
        pyams_zmq__indexer__address='ipc:///run/app/indexer',
        pyams_zmq__indexer__handler=HANDLER,
        pyams_zmq__indexer__ipc_mode='0620',
        pyams_zmq__indexer__ipc_group='root',
    )
    process = service.make_process(None)
    assert (process.ipc_mode, process.ipc_group) == (0o620, 'root')


@pytest.mark.parametrize('address', ['127.0.0.1:5555', 'ipc://@name'])
@pytest.mark.parametrize(('key', 'value'), [('ipc_mode', 0o660), ('ipc_group', 'root')])
def test_options_of_a_file_that_is_not_there(address, key, value):
    text = rf'has {key} \(option of add_zmq_process.*\), which is for an address with a file: '
    with pytest.raises(ConfigurationError, match=text):
        service_of(('indexer', {'handler': HANDLER, 'address': address, key: value}))


def test_file_of_the_workers():
    """An address of a pool may have a file, and the other one not."""
    options = {
        'handler': HANDLER,
        'address': '127.0.0.1:5555',
        'workers': 2,
        'worker_address': 'ipc:///run/app/workers',
        'worker_auth': 'worker:secret',
        'ipc_mode': '660',
    }
    assert service_of(('indexer', options)).limits == {'ipc_mode': 0o660}
