# SPDX-License-Identifier: ZPL-2.1
"""The options of a service: each is an argument of the directive, and a setting."""

import inspect
from dataclasses import fields
from inspect import get_annotations

import pytest
import zmq
import zmq.auth
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError

from handlers import MessageHandler, Process
from pool_handlers import Pool
from pyams_zmq.config import add_zmq_process, services_of
from pyams_zmq.config.kinds import DURATION, INTEGER, INTERVAL, NUMBER, POSITIVE
from pyams_zmq.config.options import FORMS, OPTIONS, Group
from pyams_zmq.config.service import POOL_OPTIONS, Service
from pyams_zmq.curve import CurveClient, CurveServer
from pyams_zmq.pool import ZMQPool
from pyams_zmq.pool.worker import PoolWorker
from pyams_zmq.process.service import LIMITS

SECRET = 'JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6'  # the example of zmq_curve(7)
PUBLIC = zmq.curve_public(SECRET.encode()).decode()
SERVER_KEYS = CurveServer(SECRET, [PUBLIC])


def make_server_keys():
    return SERVER_KEYS


def make_client_keys():
    return CurveClient(PUBLIC, SECRET)


def declare(options=(), settings=(), way='commit'):
    """Return the service that code and settings declare."""
    config = Configurator(
        settings={f'pyams_zmq.echo.{key}': value for key, value in dict(settings).items()}
    )
    config.include('pyams_zmq')
    config.add_zmq_process('echo', **dict(options))
    getattr(config, way)()
    return services_of(config.registry)['echo']


BASE = {'address': '127.0.0.1:5555', 'handler': 'handlers.MessageHandler'}
POOL = {'workers': '2', 'worker_address': '*:5580'}
WITH_USERS = {**POOL, 'worker_auth': 'worker:secret'}
WITH_JOURNAL = {**WITH_USERS, 'journal': '/run/app/echo.jobs'}


@pytest.fixture
def values(tmp_path):
    """Return a text for each option, and the options that it needs."""
    users = tmp_path / 'users'
    users.write_text('alice:secret')
    client = {'client_key': SECRET, 'server_public_key': PUBLIC}
    given = {
        'address': ('127.0.0.1:6666', {}),
        'handler': ('handlers.MessageHandler', {}),
        'factory': ('handlers.Process', {}),
        'start': ('external', {}),
        'auth': ('alice:secret', {}),
        'auth_file': (str(users), {}),
        'clients': ('127.0.0.1 10.0.0.0/8', {}),
        'curve': ('test_options.SERVER_KEYS', {}),
        'server_key': (SECRET, {'client_keys': PUBLIC}),
        'client_keys': (PUBLIC, {'server_key': SECRET}),
        'client_auth': ('bob:secret', {}),
        'client_auth_file': (str(users), {}),
        'client_curve': ('test_options.make_client_keys', {}),
        'client_key': (SECRET, client),
        'server_public_key': (PUBLIC, client),
        'timeout': ('2.5', {}),
        'connect_timeout': ('0.5', {}),
        'retries': ('3', {}),
        'send_deadline': ('yes', {}),
        'workers': ('3', {}),
        'worker_address': ('*:5580', WITH_USERS),
        'worker_auth': ('worker:secret', WITH_USERS),
        'worker_auth_file': (str(users), POOL),
        'worker_curve': ('test_options.make_server_keys', POOL),
        'worker_server_key': (SECRET, {**POOL, 'worker_client_keys': PUBLIC}),
        'worker_client_keys': (PUBLIC, {**POOL, 'worker_server_key': SECRET}),
        'ipc_mode': ('0620', {'address': 'ipc:///run/app/echo'}),
        'ipc_group': ('root', {'address': 'ipc:///run/app/echo'}),
        'stats_users': ('alice bob', POOL | {'worker_auth': 'a:b'}),
        'beat_interval': ('0.25', WITH_USERS),
        'max_memory': ('300.5', WITH_USERS),
        'journal': ('/run/app/echo.jobs', WITH_USERS),
        'keep': ('30', WITH_JOURNAL),
    }
    for name, option in OPTIONS.items():
        if name not in given:
            others = WITH_JOURNAL if option.group is Group.JOBS else WITH_USERS
            given[name] = ('7', others if option.is_for_pools else {})
    return given


def plain(service):
    """Return the values of a service, with keys that can be compared."""
    return {
        field.name: (value.public, value._secret)
        if isinstance(value := getattr(service, field.name), (CurveServer, CurveClient))
        else value
        for field in fields(service)
    }


@pytest.mark.parametrize('name', OPTIONS)
def test_option_and_setting(name, values):
    """The text of a setting has the effect of the argument, which is not that of the default."""
    assert set(values) == set(OPTIONS)
    text, others = values[name]
    others = {**BASE, **{key: value for key, value in others.items() if key != name}}
    by_option = declare({**others, name: text})
    by_setting = declare(others, {name: text})
    assert plain(by_option) == plain(by_setting)
    attribute = next((whole for whole, parts in FORMS.items() if name in parts), name)
    value = (
        by_setting.limits.get(name) if OPTIONS[name].is_limit else getattr(by_setting, attribute)
    )
    assert value is not None
    assert value not in OPTIONS[name].defaults
    assert declare({**others, name: value} if name == attribute else by_pairs(others, name, text))


def by_pairs(others, name, text):
    return {**others, name: text}


def test_table_has_what_a_service_has():
    """A new argument or limit of a process needs a row in the table, with a type that fits."""
    forms = {part for parts in FORMS.values() for part in parts}
    arguments = {name for name, option in OPTIONS.items() if not option.is_limit}
    assert arguments - forms == {field.name for field in fields(Service)} - {'name', 'limits'}
    process_limits = {
        name for name, option in OPTIONS.items() if option.is_limit and not option.is_for_pools
    }
    assert process_limits == {'concurrency', *LIMITS}
    parameters = inspect.signature(ZMQPool).parameters
    assert set(POOL_OPTIONS) <= set(parameters)
    hints = {
        key: hint for cls in reversed(ZMQPool.__mro__) for key, hint in get_annotations(cls).items()
    }
    others = {'json_load', 'worker_factory', 'loop_factory'}  # of the code of a handler or pool
    assert {name for name in get_annotations(ZMQPool) if not name.startswith('_')} - others <= set(
        OPTIONS
    )
    integers, numbers = (INTEGER, POSITIVE), (NUMBER, INTERVAL, DURATION)
    for name, option in OPTIONS.items():
        if option.is_limit and hints[name] in (int, float):
            assert option.kind in (integers if hints[name] is int else numbers), name
            assert option.unit, name


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        *((value, 'auto') for value in (True, 'true', 'True', 'yes', 'on', '1', 1, 't', ' auto ')),
        *((value, 'never') for value in (False, 'false', 'No', 'off', '0', 0, None, '', 'never')),
        ('external', 'external'),
        ('External', 'external'),
    ],
)
def test_start(value, expected):
    """What a sibling's setting of a boolean contains; what is not known does not start."""
    assert declare({**BASE, 'start': value}).start == expected
    if value not in (None, ''):  # an empty setting is a missing one
        assert declare({**BASE, 'start': 'external'}, {'start': value}).start == expected
    else:
        assert declare({**BASE, 'start': 'external'}, {'start': value}).start == 'external'


@pytest.mark.parametrize('start', ['never', 'false', False])
def test_service_that_settings_declare_to_run_elsewhere(start):
    config = Configurator(
        settings={'pyams_zmq.echo.address': '127.0.0.1:5555', 'pyams_zmq.echo.start': start}
    )
    config.include('pyams_zmq')
    config.make_wsgi_app()
    assert services_of(config.registry)['echo'].start == 'never'


@pytest.mark.parametrize('value', ['nope', 2, 'truthy'])
def test_start_that_is_not_known(value):
    with pytest.raises(ConfigurationError, match=f'bad start .*{value!r} is not allowed; write a'):
        declare({**BASE, 'start': value})


@pytest.mark.parametrize(
    ('whole', 'part'), [(whole, part) for whole, parts in FORMS.items() for part in parts]
)
@pytest.mark.parametrize('where', ['code', 'settings'])
def test_two_forms_in_one_place(whole, part, where):
    options = {whole: 'test_options.SERVER_KEYS', part: 'x:y'}
    pair = ({**BASE, **options}, {}) if where == 'code' else (BASE, options)
    text = f"'echo' has {whole} and {part}: remove one of them"
    with pytest.raises(ConfigurationError, match=text):
        declare(*pair)


def test_setting_replaces_the_other_form(tmp_path):
    users = tmp_path / 'users'
    users.write_text('alice:secret')
    assert declare({**BASE, 'auth': 'a:b'}, {'auth_file': str(users)}).auth == users
    assert declare({**BASE, 'auth_file': str(users)}, {'auth': 'a:b'}).auth == 'a:b'
    public, secret = (key.decode() for key in zmq.curve_keypair())
    other = CurveServer(secret, [public])
    keys = {'server_key': SECRET, 'client_keys': PUBLIC}
    assert declare({**BASE, 'curve': other}, keys).curve.public == PUBLIC.encode()
    assert declare({**BASE, **keys}, {'curve': 'test_options.SERVER_KEYS'}).curve is SERVER_KEYS
    # A setting replaces one of the texts.
    assert declare({**BASE, **keys}, {'client_keys': public}).curve.clients == {public}


@pytest.mark.parametrize('nothing', [None, ''])
def test_form_that_is_not_given(nothing):
    """A package passes on a setting that may be missing."""
    parts = {part: nothing for parts in FORMS.values() for part in parts}
    service = declare({**BASE, 'auth': 'a:b', **parts, 'curve': nothing})
    assert (service.auth, service.curve, service.client_auth) == ('a:b', None, None)


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (
            {'server_key': SECRET},
            'has server_key but no client_keys: set pyams_zmq.echo.client_',
        ),
        ({'worker_client_keys': PUBLIC, **POOL}, 'has worker_client_keys but no worker_server_key'),
        ({'client_key': SECRET}, 'has client_key but no server_public_key'),
        ({'server_key': 'hush', 'client_keys': PUBLIC}, 'bad server_key .*A CURVE key is 40'),
        ({'server_key': SECRET, 'client_keys': 'hush'}, 'bad client_keys .*A CURVE key is 40'),
        ({'server_key': SECRET, 'client_keys': ' '}, 'bad client_keys .*public key of at least'),
        (
            {'server_key': SECRET, 'client_keys': '/no/such/folder'},
            "bad client_keys .*Folder of CURVE keys '/no/such/folder': No such file",
        ),
        (
            {'client_key': SECRET, 'server_public_key': '/no/such.key'},
            "bad server_public_key .*CURVE key '/no/such.key': no such file",
        ),
        ({'worker_auth_file': '/no/such', **POOL}, 'bad worker_auth_file .*Credentials file'),
        ({'worker_auth_file': '/no/such'}, 'bad worker_auth_file .*Credentials file'),
        ({'stats_users': [1], **WITH_USERS}, 'bad stats_users .*write names, separated by blanks'),
        ({'workers': 'x'}, r"bad workers .*'x' is not allowed.*write an integer, 0 or more \(proc"),
        ({'send_deadline': 1}, 'bad send_deadline .*1 is not allowed.*; write true or false'),
    ],
)
def test_bad_values(options, text):
    for pair in (({**BASE, **options}, {}), (BASE, options)):
        with pytest.raises(ConfigurationError, match=text) as error:
            declare(*pair)
        assert 'hush' not in str(error.value)
        assert SECRET not in str(error.value)


def test_option_of_a_pool_without_workers(tmp_path):
    users = tmp_path / 'workers'
    users.write_text('worker:secret')
    with pytest.raises(
        ConfigurationError, match="'echo' has worker_auth_file, which is for a pool"
    ):
        declare({**BASE, 'worker_auth_file': users})


def test_keys_of_workers(tmp_path):
    """The keys of a declared pool: a folder, and the texts of keys."""
    folder = tmp_path / 'workers'
    folder.mkdir()
    zmq.auth.create_certificates(tmp_path, 'pool')
    public, _secret = zmq.auth.create_certificates(folder, 'worker')
    settings = {
        **POOL,
        'worker_server_key': f'{tmp_path}/pool.key_secret',
        'worker_client_keys': f' {folder} ',
    }
    pool = declare(BASE, settings).make_process(None)
    assert len(pool.worker_access.curve.clients) == 1
    zmq.auth.create_certificates(folder, 'other')
    pool.worker_access.reload()
    assert len(pool.worker_access.curve.clients) == 2
    for keys in (public, [public], f'{PUBLIC}\n{PUBLIC}', folder):
        settings['worker_client_keys'] = keys
        assert declare(BASE, settings).worker_curve.clients


def test_directive_as_a_function():
    """It names its caller in errors, as the directive does."""
    config = Configurator()
    config.include('pyams_zmq')
    add_zmq_process(config, 'echo', handler=MessageHandler)
    with pytest.raises(ConfigurationError, match='has no address') as error:
        config.commit()
    assert f"of file {__file__}:\n    add_zmq_process(config, 'echo'" in str(error.value)


def test_limits_of_the_worker_command():
    """They have the defaults of a worker, which differ from those of a process."""
    assert OPTIONS['overdue_grace'].defaults == [Process.overdue_grace, Pool.overdue_grace]
    assert PoolWorker.overdue_grace == Pool.overdue_grace
