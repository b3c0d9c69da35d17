# SPDX-License-Identifier: ZPL-2.1
"""Two applications: which ones are the same, and what happens at one address."""

import runpy
import signal
import sys
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from pyramid.config import Configurator
from pyramid.paster import get_app
from pyramid.registry import Registry
from pyramid.response import Response

import handlers
from app.declared import MessageHandler
from app.program import WebServer, reserved_port
from checks import TIMEOUT, wait_until
from pyams_zmq.config.identity import identify
from pyams_zmq.config.request_client import ClientRegistry
from pyams_zmq.exceptions import ZMQUnreachableError
from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.process.base import _owned
from pyams_zmq.wire.endpoint import Endpoint

INI = """
[DEFAULT]
site = example

[app:main]
use = call:test_identity:make_app

[app:staging]
use = call:test_identity:make_app

[filter:pass]
paste.filter_app_factory = test_identity:make_filter

[pipeline:filtered]
pipeline = pass staging
"""

found = []


def make_app(global_config, **settings):
    """Note the identity of an application."""
    registry = Registry('package')
    registry.settings = settings
    found.append(identify(registry))
    return Response()


def make_filter(app, global_config):
    return app


def registry_of(package='package', **settings):
    registry = Registry(package)
    registry.settings = settings
    return registry


@pytest.fixture
def ini(tmp_path):
    """Return the path of an ini file."""
    path = tmp_path / 'production.ini'
    path.write_text(INI)
    found.clear()
    return path


def test_sections_of_a_file(ini, tmp_path):
    for section in ('main', 'staging', 'filtered'):
        get_app(str(ini), section)
        get_app(f'{ini}#{section}', options={'port': '1234'})
    assert found[::2] == found[1::2]
    main = found[0]
    assert len(set(found)) == 3
    assert main.description == f'package ({ini}, section main)'
    copy = tmp_path / 'staging.ini'
    copy.write_text(INI)
    get_app(str(copy), 'main')
    assert found[-1] != main


def test_link_to_the_current_release(tmp_path):
    """Workers of the next release are of the same application as those that still run."""
    found.clear()
    link = tmp_path / 'current'
    for release in ('first', 'second'):
        (tmp_path / release).mkdir()
        (tmp_path / release / 'production.ini').write_text(INI)
        link.unlink(missing_ok=True)
        link.symlink_to(release)
        get_app(f'{link}/production.ini', 'main')
    assert found[0] == found[1]
    assert found[0].description == f'package ({link}/production.ini, section main)'


def test_file_that_another_loader_reads():
    """Its name is in the first argument of the factory."""
    loader = ModuleType('plaster_yaml')
    exec(
        'def load(factory, path, **settings): factory({"__file__": path, "here": "/"}, **settings)',
        loader.__dict__,
    )
    loader.load(make_app, '/production.yaml')
    loader.load(make_app, '/production.yaml', site='other')
    loader.load(make_app, '/staging.yaml')
    assert found[-3] == found[-2] != found[-1]
    assert found[-1].description == 'package (/staging.yaml)'


def test_program_that_is_not_a_file_with_settings(tmp_path, monkeypatch):
    """`python -m tasks` has a global `__file__`, and may have a global `here`."""
    (tmp_path / 'tasks.py').write_text(
        'import test_identity\nhere = "/srv"\ntest_identity.make_app({}, site=site)\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    for site in ('production', 'staging'):
        runpy.run_module('tasks', {'site': site}, run_name='__main__')
    assert found[-1].description == 'package (' + found[-1].name.split()[1] + ')'
    assert found[-2] != found[-1]


@pytest.mark.parametrize('settings', [{}, {'site': 'other'}])
def test_name_in_a_setting(ini, settings):
    """It is the whole identity: in every file, in every package, with any other setting."""
    settings = {'pyams_zmq.application': 'shop', **settings}
    application = identify(registry_of(**settings))
    assert application == identify(registry_of('other', **{'pyams_zmq.application': 'shop'}))
    assert application.description == 'shop'
    assert application != identify(registry_of(**{'pyams_zmq.application': 'other'}))
    assert identify(registry_of(**{'pyams_zmq.application': ''})).name != 'application '
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')


def test_settings():
    applications = [
        identify(registry_of(**settings))
        for settings in (
            {},
            {'site': 'production'},
            {'site': 'staging'},
            {'site': 'staging', 'packages': ['one', 'two']},
            {'site': 'staging', 'packages': ['one']},
            {'site': 'staging', 'packages': [object()]},
            {'site': 'staging', 'packages': object()},
            {'database': {'url': 'production'}},
            {'database': {'url': 'staging'}},
            {'database': {'url': ['staging', {'port': 1}]}},
            {'database': {'url': ['staging', {'port': 2}]}},
            {'database': {'url': ['staging', {1: 'port'}]}},
            {'data': Path('/srv/production')},
            {'data': Path('/srv/staging')},
            {'data': b'staging'},
            {'data': {'a', 'b'}},
            {'data': frozenset({'a', 'c'})},
            {'data': Decimal('1.1')},
            {'data': date(2026, 1, 1)},
        )
    ]
    assert len(set(applications)) == len(applications)
    assert len({application.description for application in applications}) == 1
    # Objects differ from worker to worker.
    assert identify(registry_of(cache=object())) == identify(registry_of(cache=object()))
    assert identify(registry_of(a={'b': object()})) == identify(registry_of(a={'b': object()}))
    assert identify(registry_of(one=1, two=2)) == identify(registry_of(two=2, one=1))
    itself = {'a': 1}
    itself['itself'] = [itself]
    assert identify(registry_of(**itself)) == identify(registry_of(**itself))
    secret = identify(registry_of(password='hush-hush'))
    assert 'hush-hush' not in str(secret)
    registry = Registry('package')
    assert identify(registry) == identify(registry_of())


def test_places_of_a_package(monkeypatch):
    keys = set()
    for path in ('/production/package.py', '/staging/package.py', None):
        module = ModuleType('package')
        module.__file__ = path
        monkeypatch.setitem(sys.modules, 'package', module)
        keys.add(identify(registry_of()).name)
    assert len(keys) == 3


def test_two_applications_at_one_address(serve, tmp_path):
    """The second one says so, does not use the service of the first, and starts when that ends."""
    address = f'ipc://{tmp_path}/zmq.sock'
    production = serve('pserve', application='declared', address=address)
    folder = tmp_path / 'staging'
    folder.mkdir()
    staging = WebServer.pserve(folder, application='declared', address=address)
    try:
        answer = wait_until(staging.get, TIMEOUT)
        status, text = answer['reply']
        assert status == 503
        assert text.startswith(f"'worker' is not running: another application serves {address}")
        assert f'service worker of app ({tmp_path}/application.ini, section main)' in text
        log = wait_until(lambda: 'ERROR' in staging.log.read_text() and staging.log.read_text())
        assert log.count('worker cannot start at') == 1
        assert production.get()['reply'][0] == 200
        production.end()
        staging.wait_for_service(TIMEOUT)
    finally:
        staging.end()


def test_service_of_another_application():
    """Its client is refused before it connects; the text says what to do."""
    clients = ClientRegistry(registry_of())
    clients.address_locks['worker'] = SimpleNamespace(
        address='tcp://127.0.0.1:25556', find_other_owner=lambda: 'service worker of other'
    )
    with pytest.raises(ZMQUnreachableError) as error:
        clients.get('worker')
    assert str(error.value) == (
        "'worker' is not running: another application serves tcp://127.0.0.1:25556 (service worker "
        'of other): stop that one, or choose another address, pyams_zmq.worker.address'
    )


@pytest.fixture
def start_other(tmp_path):
    """Start a server with settings in another folder; kill it at the end."""
    folder = tmp_path / 'staging'
    folder.mkdir()
    started = []

    def start(**settings):
        server = WebServer.pserve(folder, application='declared', **settings)
        started.append(server)
        return server

    yield start
    for server in started:
        server.end()


def refusal_of(server):
    """Wait for the answer of a server, and return why it cannot call its service."""
    status, text = wait_until(server.get, TIMEOUT)['reply']
    assert status == 503
    assert text.startswith("'worker' is not running: another application serves ")
    return text


def test_address_of_all_interfaces(serve, start_other):
    with reserved_port() as port:
        production = serve('pserve', application='declared', address=f'127.0.0.1:{port}')
        staging = start_other(address=f'*:{port}')
        assert 'service worker of app (' in refusal_of(staging)
        wait_until(lambda: 'worker cannot start at' in staging.log.read_text(), TIMEOUT)
        production.end()
        staging.wait_for_service(TIMEOUT)


def serve_by_command(run_program, folder, address):
    """Run a service of an application by `pyams_zmq serve`."""
    folder.mkdir(exist_ok=True)
    settings = {'pyams_zmq.worker.start': 'external', 'pyams_zmq.worker.bind_timeout': '20'}
    ini = WebServer.configure(folder, 'declared', settings)
    options = ('-W', 'ignore:pkg_resources is deprecated')
    return run_program(
        *options, '-m', 'pyams_zmq', 'serve', str(ini), 'worker', f'address={address}'
    )


@pytest.mark.parametrize('start', ['auto', 'external'])
def test_service_of_another_application_that_a_command_runs(
    run_program, start_other, ask, tmp_path, start
):
    address = f'ipc://{tmp_path}/zmq.sock'
    production = serve_by_command(run_program, tmp_path / 'production', address)
    assert ask(address, ['pid', None], timeout=TIMEOUT)[0] == 200
    staging = start_other(address=address, **{'pyams_zmq.worker.start': start})
    assert 'production/application.ini, section main' in refusal_of(staging)
    production.end()
    if start == 'auto':
        staging.wait_for_service(TIMEOUT)


def test_command_does_not_take_the_address_of_another_application(
    run_program, start_other, tmp_path
):
    address = f'ipc://{tmp_path}/zmq.sock'
    start_other(address=address).wait_for_service(TIMEOUT)
    program = serve_by_command(run_program, tmp_path / 'production', address)
    assert program.wait(TIMEOUT) == 1
    text = 'Another application of this user serves ' + address
    assert text in program.log.read_text()


def test_commands_of_one_application_take_turns(run_program, ask, tmp_path):
    """The second one waits until the first one has ended, and reserves the address then."""
    address = f'ipc://{tmp_path}/zmq.sock'
    first = serve_by_command(run_program, tmp_path / 'one', address)
    [_status, pid] = ask(address, ['pid', None], timeout=TIMEOUT)
    second = serve_by_command(run_program, tmp_path / 'one', address)
    wait_until(psutil.Process(second.pid).children, TIMEOUT)
    first.send_signal(signal.SIGTERM)
    assert first.wait(TIMEOUT) == 0
    lock = AddressLock([Endpoint.parse(address, bind=True)], 'other', 'other')
    owner = wait_until(lock.find_other_owner, TIMEOUT)
    assert owner.endswith(f'process {second.pid}')
    assert ask(address, ['pid', None], timeout=TIMEOUT)[1] != pid


def test_script_of_another_application(serve, run_program, tmp_path):
    """A script does not start services, and does not call those of another application."""
    address = f'ipc://{tmp_path}/zmq.sock'
    serve('pserve', application='declared', address=address)
    own = tmp_path / 'application.ini'
    copy = tmp_path / 'staging.ini'
    copy.write_text(own.read_text())
    for ini, expected in ((own, 200), (copy, 503)):
        program = run_program('-c', SCRIPT, str(ini), address)
        assert program.read(TIMEOUT)[0] == expected


SCRIPT = """
import json
import sys
import warnings
warnings.simplefilter('ignore')
from pyramid.paster import bootstrap
from app.declared import home
with bootstrap(sys.argv[1], options={'address': sys.argv[2]}) as env:
    print(json.dumps(home(env['request'])['reply']))
"""


def test_address_of_a_program_that_is_not_known(serve, start_other, start, tmp_path):
    """The service cannot be bound: its messages do not go to the program that is there."""
    address = f'ipc://{tmp_path}/zmq.sock'
    process = start(address, MessageHandler)
    staging = start_other(address=address, **{'pyams_zmq.worker.bind_timeout': '0.1'})

    def refusal():
        answer = staging.get()
        return answer and answer['reply'][0] == 503 and answer['reply'][1]

    text = wait_until(refusal, TIMEOUT)
    assert text.partition(': stop that')[0].endswith('(an unknown program)')
    process.stop()
    staging.wait_for_service(TIMEOUT)


def test_lock_folder_of_another_user(lock_folder, tmp_path, monkeypatch, caplog):
    """A script then runs as before; a server starts its services without that protection."""
    lock_folder.write_text('')
    for program in ('pyams_script', 'server', 'second worker of the server'):
        caplog.clear()
        monkeypatch.setattr(sys, 'argv', [program])
        with Configurator() as config:
            config.include('pyams_zmq')
            config.add_zmq_process(
                'worker',
                handler=handlers.MessageHandler,
                address=f'ipc://{tmp_path}/sock',
                timeout=TIMEOUT,
                retries=3,
            )
            registry = config.make_wsgi_app().registry
        assert registry.zmq_clients.address_locks == {}
        [*_, record] = caplog.records
        assert record.levelname == ('WARNING' if program == 'pyams_script' else 'ERROR')
        for text in ('service worker of ', str(lock_folder), 'set TMPDIR'):
            assert text in record.getMessage()
    assert registry.zmq_clients.get('worker').call('echo', 1) == 1
    first, second = sorted(
        (process for process in _owned if process.is_alive()),
        key=lambda process: process.pid,
    )
    first.stop()
    assert registry.zmq_clients.get('worker').call('echo', 1) == 1  # the other one takes over
    second.stop()
    assert (first.exitcode, second.exitcode) == (0, 0)
    registry.zmq_clients.close()
