# SPDX-License-Identifier: ZPL-2.1
"""Users from a file that a setting names: where it is, and how it is read again."""

import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import zmq.auth
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError
from pyramid.paster import get_app
from pyramid.registry import Registry

from app.external import INI
from checks import TIMEOUT, wait_until
from handlers import MessageHandler, Process
from pyams_zmq.auth import FirstUser
from pyams_zmq.cli import main
from pyams_zmq.client import ZMQClient
from pyams_zmq.config import services_of
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.socket import zmq_socket
from users import NOBODY, needs_root, run_as

OPTIONS = ('auth_file', 'worker_auth_file', 'client_auth_file')
BASE = {
    'address': '127.0.0.1:5555',
    'handler': 'handlers.MessageHandler',
    'start': 'external',
    'workers': '1',
    'worker_address': '127.0.0.1:5556',
    'worker_auth': 'worker:secret',
}
APP = """
[app:main]
use = call:test_auth_file:make_app
folder = %(here)s
"""

KEPT = 'keeps its users and keys: '
READ = 'has read its users and keys again'

made = []


@pytest.fixture
def users(tmp_path):
    path = tmp_path / 'users'
    path.write_text('# user:password\n\nalice:open:sesame\nbob:builder\n')
    return path


def service_of(**settings):
    """Return a service that settings declare."""
    settings = {f'pyams_zmq.echo.{key}': value for key, value in settings.items()}
    config = Configurator(settings=settings)
    config.include('pyams_zmq')
    config.commit()
    return services_of(config.registry)['echo']


def make_app(global_config, **settings):
    """Make an application, and keep its service."""
    config = Configurator(settings=settings)
    config.include('pyams_zmq')
    app = config.make_wsgi_app()
    made.append(services_of(app.registry)['echo'])
    return app


def one_user(path):
    path.write_text('alice:open:sesame')
    return path


@pytest.mark.parametrize('option', OPTIONS)
@pytest.mark.parametrize('value', ['{folder}/users', '%(here)s/users', 'users', './conf/../users'])
def test_path_in_an_ini_file(tmp_path, monkeypatch, option, value):
    """A relative path is relative to the file, not to the working folder."""
    users = one_user(tmp_path / 'users')
    (tmp_path / 'conf').mkdir()
    (tmp_path / 'conf/elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'conf')
    settings = {**BASE, option: value.format(folder=tmp_path)}
    settings.pop(option.removesuffix('_file'), None)
    ini = tmp_path / 'app.ini'
    lines = [f'pyams_zmq.echo.{key} = {item}' for key, item in settings.items()]
    ini.write_text('\n'.join([APP, *lines]))
    for uri in (str(ini), '../app.ini'):
        get_app(uri, 'main')
        found = getattr(made.pop(), option.removesuffix('_file'))
        assert isinstance(found, Path)
        assert found.is_absolute()
        assert found.samefile(users)


def test_asset(tmp_path, monkeypatch):
    package = tmp_path / 'package_with_users'
    package.mkdir()
    (package / '__init__.py').touch()
    users = one_user(package / 'users')
    monkeypatch.syspath_prepend(tmp_path)
    assert service_of(**BASE, auth_file='package_with_users:users').auth == users
    for text in ('package_with_users:hush', 'no_such_package:hush', 'a b:hush', ':hush'):
        with pytest.raises(ConfigurationError, match='or its file was not found') as error:
            service_of(**BASE, auth_file=text)
        assert 'hush' not in str(error.value)


@pytest.mark.parametrize('folder', ['{here}/my keys', 'my keys', './my keys', 'my_keys:'])
def test_keys_beside_the_ini_file(tmp_path, monkeypatch, folder):
    """The folder and the file of keys are found as a file of users is."""
    keys = tmp_path / ('my_keys' if ':' in folder else 'my keys')
    keys.mkdir()
    (keys / '__init__.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    zmq.auth.create_certificates(keys, 'one')
    ini = tmp_path / 'app.ini'
    settings = {**BASE, 'client_keys': folder.format(here=tmp_path)}
    separator = '' if ':' in folder else '/'
    settings['server_key'] = f'{settings["client_keys"]}{separator}one.key_secret'
    lines = [f'pyams_zmq.echo.{key} = {item}' for key, item in settings.items()]
    ini.write_text('\n'.join([APP, *lines]))
    get_app(str(ini), 'main')
    curve = made.pop().curve
    assert curve.clients == {curve.public.decode()}
    zmq.auth.create_certificates(keys, 'two')
    curve.reload()
    assert len(curve.clients) == 2


def test_folder_of_keys_that_is_not_there(tmp_path):
    """It may be a key as well, which it is not, either."""
    config = Configurator(settings={'here': str(tmp_path)})
    config.include('pyams_zmq')
    key = zmq.curve_keypair()[1].decode()
    config.add_zmq_process('echo', **BASE, server_key=key, client_keys='no_folder')
    with pytest.raises(ConfigurationError, match='bad client_keys') as error:
        config.commit()
    assert key not in str(error.value)


def test_folder_of_the_ini_file_in_a_setting(tmp_path):
    """Some applications merge the global configuration into their settings."""
    users = one_user(tmp_path / 'users')
    config = Configurator(settings={'here': str(tmp_path)})
    config.include('pyams_zmq')
    config.add_zmq_process('echo', **BASE, auth_file='users')
    config.commit()
    assert services_of(config.registry)['echo'].auth == users


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        ('users', 'The path is relative, and no ini file is known; write an absolute path'),
        ('file:/run/users', "Paths do not begin with 'file:'; write an absolute path"),
        ('file:///run/users', "Paths do not begin with 'file:'"),
        (42, 'A int is not a path'),
        ('/no/such/users', "Credentials file '/no/such/users': No such file or directory"),
        ('/', "Credentials file '/': Is a directory"),
    ],
)
@pytest.mark.parametrize('option', OPTIONS)
def test_bad_path(option, value, text):
    settings = {key: item for key, item in BASE.items() if f'{key}_file' != option}
    text = rf'bad {option} \(setting pyams_zmq\.echo\.{option}\): {text}'
    with pytest.raises(ConfigurationError, match=text):
        service_of(**settings, **{option: value})


def test_bad_file(tmp_path):
    users = tmp_path / 'users'
    users.write_text('alice:secret\nsecret\n')
    with pytest.raises(ConfigurationError, match='bad auth_file .*Bad credentials in ') as error:
        service_of(**BASE, auth_file=users)
    assert f'{str(users)!r}' in str(error.value)
    assert 'secret' not in str(error.value)
    users.write_text('alice:secret\nbob:secret\n')
    with pytest.raises(ConfigurationError, match='bad client_auth_file .*connects as one user'):
        service_of(**BASE, client_auth_file=users)


# The URI of a file that is given instead of users


@pytest.mark.parametrize(
    'auth',
    ['file:/run/hush', 'file:///run/hush', ' FILE:/run/hush', 'a:b\nfile:/hush', ['file:/hush']],
)
@pytest.mark.parametrize(
    'use',
    [
        lambda auth: ZMQProcess('127.0.0.1', MessageHandler, auth),
        lambda auth: Process('127.0.0.1', MessageHandler, auth=auth),
        lambda auth: ZMQPool('127.0.0.1', MessageHandler, auth),
        lambda auth: ZMQPool(
            '127.0.0.1', MessageHandler, worker_address='127.0.0.1', worker_auth=auth
        ),
        lambda auth: ZMQClient('127.0.0.1:5555', auth=auth),
        lambda auth: zmq_socket('127.0.0.1:5555', auth=auth),
        lambda auth: zmq_socket('tcp://127.0.0.1:5555', auth=auth),
        lambda auth: service_of(**BASE, auth=auth),
        lambda auth: service_of(**BASE, client_auth=auth),
        lambda auth: service_of(**{**BASE, 'worker_auth': auth}),
    ],
)
def test_uri_of_a_file(use, auth):
    with pytest.raises((ValueError, ConfigurationError), match=r'URI of a file; .*auth_file') as e:
        use(auth)
    assert 'hush' not in str(e.value)


@pytest.mark.parametrize('option', ['auth', 'worker_auth', 'client_auth'])
@pytest.mark.parametrize('value', ['file:users', 'FILE: conf/../users'])
def test_uri_of_a_file_beside_the_ini_file(users, option, value):
    (users.parent / 'conf').mkdir()
    settings = {**BASE, option: value}
    ini = users.parent / 'app.ini'
    text = ''.join(f'pyams_zmq.echo.{key} = {each}\n' for key, each in settings.items())
    ini.write_text(APP + text)
    with pytest.raises(ConfigurationError, match=f'bad {option} .*: It is a file beside the ini'):
        get_app(str(ini))
    users.unlink()
    get_app(str(ini))  # a user "file" may have any password


def test_users_that_only_look_like_a_file(users):
    """A mapping and a file list users, and nothing else."""
    users.write_text('file:/secret')
    assert Process('127.0.0.1', auth=users).passwords == {'file': '/secret'}
    assert Process('127.0.0.1', auth={'file': '/secret'}).passwords == {'file': '/secret'}
    assert Process('127.0.0.1', auth='file:secret').passwords == {'file': 'secret'}


def test_path_without_a_user():
    with pytest.raises(ValueError, match=r"write auth='user:password', .*; name a file by a path "):
        Process('127.0.0.1', auth='/run/users')


@pytest.mark.parametrize('value', ['file:/no/such', 'file:///no/such'])
def test_uri_on_the_command_line(monkeypatch, capsys, value):
    monkeypatch.setattr(sys, 'argv', ['pyams_zmq'])
    with pytest.raises(SystemExit) as error:
        main(['worker', '127.0.0.1:5555', 'handlers.MessageHandler', '--auth-file', value])
    assert error.value.code == 2
    assert "No such file or directory; write its path without 'file:'" in capsys.readouterr().err


# The user of the application


def test_user_of_the_application(users, tmp_path):
    own = tmp_path / 'own'
    own.write_text('webapp:secret')

    def user_of(**settings):
        with service_of(**BASE, **settings).make_client() as client:
            return dict(client._service.users)

    assert user_of() == {}
    assert user_of(auth_file=users) == {'alice': 'open:sesame'}
    assert user_of(auth_file=users, client_auth='bob:builder') == {'bob': 'builder'}
    assert user_of(auth_file=users, client_auth_file=own) == {'webapp': 'secret'}
    assert user_of(auth='a:b', client_auth_file=own) == {'webapp': 'secret'}
    assert user_of(auth='a:b\nc:d') == {'a': 'b'}


def test_first_user(users, caplog):
    user = FirstUser(users)
    assert (len(user), list(user), user['alice']) == (1, ['alice'], 'open:sesame')
    assert 'sesame' not in repr(user)
    users.write_text('carol:new\nalice:open:sesame')
    assert dict(user.items()) == {'carol': 'new'}
    users.write_text('hush')
    for _connection in range(2):
        assert dict(user.items()) == {'carol': 'new'}
    [record] = caplog.records
    assert f"A client keeps its user: Bad credentials in '{users}'" in record.getMessage()
    assert 'hush' not in record.getMessage()
    users.write_text('dave:new')
    assert dict(user.items()) == {'dave': 'new'}
    users.unlink()
    assert dict(user.items()) == {'dave': 'new'}
    assert 'No such file' in caplog.records[-1].getMessage()


def test_password_of_the_application_changes(users, address, start, wait_for_refusal):
    """Open connections stay, and new ones have the new password, without a new client."""
    service = service_of(
        address=address, handler='handlers.MessageHandler', auth_file=users, start='external'
    )
    process = start(factory=lambda: service.make_process(Registry()))
    with service.make_client() as client:
        assert client.call('who', 1)[0] == 'alice'
        users.write_text('alice:changed\n')
        process.reload()
        wait_for_refusal(address, 'alice:open:sesame')
        assert client.call('who', 1)[0] == 'alice'
        process.stop()
        start(factory=lambda: service.make_process(Registry()))
        assert client.call('who', 1)[0] == 'alice'


# Read again, in real programs


class Served:
    """A program that serves a service, which settings declare."""

    def __init__(self, folder, run_program, **settings):
        names = {'handler': 'handlers.MessageHandler', 'start': 'external', **settings}
        lines = '\n'.join(f'pyams_zmq.echo.{key} = {value}' for key, value in names.items())
        ini = folder / 'serve.ini'
        text = INI.replace('external:main', 'external:plain')
        ini.write_text(text.format(folder=folder, setting=lines))
        options = ('-W', 'ignore', '-m', 'pyams_zmq')
        self.program = run_program(*options, 'serve', str(ini), 'echo')

    def log(self):
        return self.program.log.read_text()

    def hang_up(self, text):
        """Send SIGHUP, and wait until the log contains a text once more."""
        count = self.log().count(text)
        self.program.send_signal(signal.SIGHUP)
        wait_until(lambda: self.log().count(text) > count, TIMEOUT)

    def stop(self):
        self.program.send_signal(signal.SIGTERM)
        assert self.program.wait(TIMEOUT) == 0
        log = self.log()
        assert 'Traceback' not in log
        for secret in ('sesame', 'builder', 'hush', 'secret'):
            assert secret not in log


@pytest.fixture
def wait_for_refusal(ask):
    """Wait until a user is refused."""

    def wait(address, auth):
        # Of a refusal within 0.1 s of a reply, a socket on a loaded machine may not learn.
        wait_until(lambda: ask(address, ['echo', 1], auth=auth, timeout=1)[0] == 401)

    return wait


@pytest.fixture
def serve(tmp_path, run_program):
    return partial(Served, tmp_path, run_program)


def test_hang_up(users, address, serve, ask, wait_for_refusal):
    served = serve(address=address, auth_file='users')
    assert ask(address, ['echo', 1], auth='bob:builder', timeout=TIMEOUT) == [200, 1]
    users.write_text('alice:open:sesame\ncarol:hush\n')
    served.hang_up(READ)
    wait_for_refusal(address, 'bob:builder')
    assert ask(address, ['echo', 1], auth='carol:hush') == [200, 1]
    for damage in (lambda: users.write_text('hush'), users.unlink, users.mkdir):
        damage()
        served.hang_up(f'ERROR echo {KEPT}')
        assert ask(address, ['echo', 1], auth='carol:hush') == [200, 1]
    users.rmdir()
    users.write_text('bob:builder')
    served.hang_up(READ)
    wait_for_refusal(address, 'carol:hush')
    assert ask(address, ['echo', 1], auth='bob:builder') == [200, 1]
    served.stop()


@needs_root
def test_file_of_another_user(users):
    process = Process('127.0.0.1', auth=users)
    users.write_text('carol:hush')
    users.chmod(0o600)
    config = Configurator()
    config.include('pyams_zmq')
    config.commit()  # that user may not enter the folder of the package
    run_as(NOBODY, NOBODY, check_without_permission, process.access, config, users)


def check_without_permission(access, config, users):
    assert not access.try_reload('echo')
    assert sorted(access.users) == ['alice', 'bob']
    config.add_zmq_process('echo', **BASE, auth_file=users)
    with pytest.raises(ConfigurationError, match=r'bad auth_file \(.*: Permission denied'):
        config.commit()


def test_hang_up_of_a_pool(users, tmp_path, serve, ask):
    workers = tmp_path / 'workers'
    workers.write_text('worker:secret')
    address, worker_address = f'ipc://{tmp_path}/zmq.sock', f'ipc://{tmp_path}/workers.sock'
    served = serve(
        address=address,
        auth_file='users',
        workers=1,
        worker_address=worker_address,
        worker_auth_file='workers',
    )

    def is_admitted(auth):
        """Return True if the broker accepts a user as a worker; it does not reply to messages."""
        return ask(worker_address, ['echo', 1], auth=auth, timeout=0.5)[0] != 401

    assert ask(address, ['echo', 1], auth='bob:builder', timeout=TIMEOUT) == [200, 1]
    assert is_admitted('worker:secret')
    workers.write_text('other:hush')
    served.hang_up(f'echo (workers) {READ}')
    wait_until(lambda: is_admitted('other:hush'))
    assert not is_admitted('worker:secret')
    workers.unlink()
    served.hang_up(f'echo (workers) {KEPT}')
    assert is_admitted('other:hush')
    assert ask(address, ['echo', 1], auth='bob:builder') == [200, 1]
    served.stop()
