# SPDX-License-Identifier: ZPL-2.1
"""Errors of the configuration name the setting, the ini file and its section."""

import re

import pytest
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationError
from pyramid.paster import get_app

from app.program import WebServer
from checks import TIMEOUT
from pyams_zmq.config.identity import Ini

SERVICE = {'address': '127.0.0.1:5555', 'handler': 'handlers.MessageHandler', 'start': 'external'}

INI = """
[app:main]
use = call:test_setting_errors:make_app

[app:shop]
use = call:test_setting_errors:make_app
{settings}
"""

MISTAKES = pytest.mark.parametrize(
    ('settings', 'text'),
    [
        (
            {**SERVICE, 'timeout': '10 seconds'},
            "ØMQ process 'echo', bad timeout (setting pyams_zmq.echo.timeout{place}): '10 seconds' "
            'is not allowed. Expected `float`, got `str`; write a number above 0 (seconds)',
        ),
        (
            {**SERVICE, 'tiemout': '10'},
            "Unknown setting 'pyams_zmq.echo.tiemout'{place}: did you mean pyams_zmq.echo.timeout?",
        ),
        (
            {**SERVICE, 'start': 'later'},
            "bad start (setting pyams_zmq.echo.start{place}): 'later' is not allowed; write auto, ",
        ),
        (
            {'start': 'maybe'},
            "bad start (setting pyams_zmq.echo.start{place}): 'maybe' is not allowed; write auto, ",
        ),
        (
            {**SERVICE, 'handler': 'handlers.Nothing'},
            "bad handler (setting pyams_zmq.echo.handler{place}): 'handlers.Nothing' cannot be ",
        ),
        (
            {**SERVICE, 'handler': 'handlers.__name__'},
            'bad handler (setting pyams_zmq.echo.handler{place}): The handler builtins.str ',
        ),
        (
            {**SERVICE, 'auth': 'hush'},
            'bad auth (setting pyams_zmq.echo.auth{place}): Bad credentials: write ',
        ),
        (
            {**SERVICE, 'auth': 'file:/run/hush'},
            'bad auth (setting pyams_zmq.echo.auth{place}): Bad credentials: the URI of a file; '
            'name a file by a path object, in a declared service by auth_file',
        ),
        (
            {**SERVICE, 'server_key': 'hush'},
            "ØMQ process 'echo' has server_key but no client_keys: set pyams_zmq.echo.client_keys"
            '{place}',
        ),
        (
            {**SERVICE, 'curve': 'hush'},
            'bad curve (setting pyams_zmq.echo.curve{place}): It cannot be imported; write ',
        ),
        (
            {'handler': 'handlers.MessageHandler'},
            "ØMQ process 'echo' has no address: pass it to add_zmq_process, or set "
            'pyams_zmq.echo.address{place}',
        ),
        (
            {**SERVICE, 'queue_limit': '7'},
            "ØMQ process 'echo' has queue_limit, which is for a pool: set pyams_zmq.echo.workers"
            '{place}, or remove it (setting pyams_zmq.echo.queue_limit{place})',
        ),
        (
            {**SERVICE, 'ipc_mode': '0600'},
            "ØMQ process 'echo' has ipc_mode (setting pyams_zmq.echo.ipc_mode{place}), which is ",
        ),
        (
            {'timeout': '3'},
            "ØMQ process 'echo' has no handler: set pyams_zmq.echo.handler{place}, or call "
            "config.add_zmq_process('echo', handler=...); settings name it: pyams_zmq.echo.timeout",
        ),
    ],
    ids=lambda value: list(value)[-1] if isinstance(value, dict) else '',
)


def names_of(settings):
    return {f'pyams_zmq.echo.{key}': value for key, value in settings.items()}


def make_app(global_config, **settings):
    """Make an application that includes the package."""
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        return config.make_wsgi_app()


def check(error, text, place, where):
    message = str(error)
    assert text.format(place=place) in message
    assert 'None' not in message
    assert 'hush' not in message
    if '\n  in:\n' in message:  # an action of Pyramid
        assert message.endswith(f'\n  in:\n  settings of {where}')


@MISTAKES
def test_ini_file(tmp_path, settings, text):
    ini = tmp_path / 'shop.ini'
    lines = '\n'.join(f'{key} = {value}' for key, value in names_of(settings).items())
    ini.write_text(INI.format(settings=lines))
    for arguments in ((f'{ini}#shop',), (str(ini), 'shop')):
        with pytest.raises(ConfigurationError) as error:
            get_app(*arguments)
        check(error.value, text, f' in {ini}, section shop', f'{ini}, section shop')
    get_app(str(ini), 'main')


PIPELINE = """
[app:other]
use = call:test_setting_errors:make_app
pyams_zmq.echo.workers = 1

[app:shop]
use = call:test_setting_errors:make_app
pyams_zmq.echo.workers = 1
# pyams_zmq.echo.retries = 1
pyams_zmq.echo.retries.x : 1

[filter:pass]
paste.filter_app_factory = test_identity:make_filter

[pipeline:filtered]
pipeline = pass shop
"""


def test_section_of_the_setting(tmp_path):
    """It is not that of the pipeline, which the server loads."""
    ini = tmp_path / 'shop.ini'
    ini.write_text(PIPELINE)
    with pytest.raises(ConfigurationError) as error:
        get_app(str(ini), 'filtered')
    assert f"Unknown setting 'pyams_zmq.echo.retries.x' in {ini}, section shop: " in str(
        error.value
    )
    for key, section, expected in (
        ('workers', 'filtered', 'other'),  # the first one
        ('workers', 'shop', 'shop'),
        ('retries', 'filtered', 'filtered'),  # only a comment
    ):
        assert Ini(str(ini), section).locate(f'pyams_zmq.echo.{key}').section == expected


def test_file_that_cannot_be_read(tmp_path):
    """It has been replaced, or another loader has read something that is not an ini file."""
    for path in (tmp_path / 'nothing', tmp_path):
        ini = Ini(str(path), 'main')
        assert ini.locate('pyams_zmq.echo.timeout') == ini
    (tmp_path / 'latin').write_bytes('[app:main]\nsite = Ø\n'.encode('latin-1'))
    ini = Ini(str(tmp_path / 'latin'), 'main')
    assert ini.locate('site') == ini


@MISTAKES
def test_settings_without_a_file(settings, text):
    with pytest.raises(ConfigurationError) as error:
        make_app({}, **names_of(settings))
    check(error.value, text, '', 'the application')


@pytest.mark.parametrize('autocommit', [True, False])
@pytest.mark.parametrize('include', [True, False])
def test_place_of_the_includer(autocommit, include):
    """What the application configures after the include keeps its own line."""
    config = Configurator(autocommit=autocommit, settings=names_of({**SERVICE, 'start': 'never'}))
    if include:
        config.include('pyams_zmq')
    else:
        from pyams_zmq import includeme

        includeme(config)
    assert not config.info
    if not autocommit:
        for _ in range(2):
            config.action('mine', lambda: None)
        with pytest.raises(ConfigurationConflictError) as error:
            config.commit()
        assert 'settings' not in str(error.value)


@pytest.mark.parametrize('server', ['pserve', 'gunicorn'])
def test_servers(run_program, tmp_path, server):
    """The user of a server sees the file, in the log of the server."""
    name = 'pyams_zmq.worker.tiemout'
    program = run_program(factory=getattr(WebServer, server), application='declared', **{name: '3'})
    assert program.wait(TIMEOUT) != 0
    log = program.log.read_text()
    ini = tmp_path / 'application.ini'
    assert f"Unknown setting '{name}' in {ini}, section main: did you mean pyams_zmq.worker." in log
    assert 'of file None' not in log


def test_two_services_at_one_address(tmp_path):
    settings = names_of({'address': '127.0.0.1:5555', 'handler': 'handlers.MessageHandler'})
    other = {key.replace('echo', 'other'): value for key, value in settings.items()}
    with pytest.raises(ConfigurationError) as error:
        make_app({}, **settings, **other)
    text = '(setting pyams_zmq.echo.address; setting pyams_zmq.other.address)'
    assert text in str(error.value)


@pytest.mark.parametrize(('name', 'similar'), [('eco', "; did you mean 'echo'?"), ('xyz', '')])
def test_settings_of_a_service_that_is_not_declared(name, similar):
    settings = {**names_of({**SERVICE, 'start': 'never'}), f'pyams_zmq.{name}.auth': 'a:hush'}
    with pytest.raises(ConfigurationError) as error:
        make_app({}, **settings)
    assert re.search(rf'settings name it: pyams_zmq\.{name}\.auth(; did you.*)?$', str(error.value))
    assert str(error.value).endswith(f'.auth{similar}')


def test_option_in_code():
    """The error names the line of the directive, and not a setting that is not there."""
    config = Configurator()
    config.include('pyams_zmq')
    config.add_zmq_process('echo', **{**SERVICE, 'timeout': 'x'})
    with pytest.raises(ConfigurationError) as error:
        config.commit()
    assert 'bad timeout (option of add_zmq_process; setting pyams_zmq.echo.timeout' in str(
        error.value
    )
    assert f'of file {__file__}:\n' in str(error.value)
