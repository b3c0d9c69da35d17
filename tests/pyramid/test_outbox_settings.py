# SPDX-License-Identifier: ZPL-2.1
"""The outbox of an application: directive, settings, and their errors."""

import sys

import pytest
import sqlalchemy as sql
import sqlalchemy.orm
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationError
from pyramid.paster import get_app

from pyams_zmq.config.outbox import check_outbox_settings
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.sqlalchemy import SQLAlchemyStorage

TABLE = 'pyams_zmq_outbox'

metadata = sql.MetaData()

HERE = f'{__name__}.metadata'


def find_session(request):
    """Return the session of a request."""


def make_config(*directives, autocommit=False, **settings):
    """Return the configurator of an application, with calls of the directive.

    :param directives: pairs of a kind and options
    """
    config = Configurator(
        settings={f'pyams_zmq.{key}': value for key, value in settings.items()},
        autocommit=autocommit,
    )
    config.include('pyams_zmq')
    for kind, options in directives:
        config.set_zmq_outbox(kind, **options)
    return config


def make_registry(*directives, **options):
    """Return the registry of such an application."""
    config = make_config(*directives, **options)
    config.commit()
    return config.registry


def storage_of(registry):
    """Return the storage of an application that has an outbox."""
    outbox = registry.zmq_clients.outbox
    assert isinstance(outbox, Outbox)
    return outbox._storage


def shown(registry):
    """Return what the introspection of Pyramid has about the outbox."""
    [item] = registry.introspector.get_category('ZMQ outbox')
    return item['introspectable'].title, dict(item['introspectable'])


# Choices


def test_no_outbox():
    config = make_config()
    assert (config.registry.zmq_outbox, config.registry.zmq_clients.outbox) == (None, None)
    app = config.make_wsgi_app()
    assert app.registry.zmq_outbox is None
    assert config.introspector.get_category('ZMQ outbox') is None


@pytest.mark.parametrize('autocommit', [True, False])
def test_directive(autocommit):
    own = sql.MetaData()
    registry = make_registry(('sqlalchemy', {'metadata': own}), autocommit=autocommit)
    assert TABLE in own.tables
    assert storage_of(registry).table is own.tables[TABLE]
    assert shown(registry) == ("ZMQ outbox 'sqlalchemy'", {'kind': 'sqlalchemy', 'metadata': own})


@pytest.mark.parametrize('autocommit', [True, False])
def test_settings(autocommit):
    settings = {'outbox': 'sqlalchemy', 'outbox_metadata': HERE, 'outbox_session': 'db'}
    registry = make_registry(autocommit=autocommit, **settings)
    assert storage_of(registry).table is metadata.tables[TABLE]
    assert storage_of(registry)._session == 'db'
    assert shown(registry) == (
        "ZMQ outbox 'sqlalchemy'",
        {'kind': 'sqlalchemy', 'metadata': metadata, 'session': 'db'},
    )


def test_empty_settings():
    """They are as if they were not set."""
    empty = dict.fromkeys(('outbox', 'outbox_session', 'outbox_metadata', 'outbox_database'), '')
    assert make_config(**empty).make_wsgi_app().registry.zmq_outbox is None
    registry = make_registry(('sqlalchemy', {'session': find_session}), **empty)
    assert storage_of(registry)._session is find_session


@pytest.mark.parametrize('autocommit', [True, False])
@pytest.mark.parametrize('has_kind', [True, False])
def test_settings_override_the_directive(autocommit, has_kind):
    own = sql.MetaData()
    settings = {'outbox': 'sqlalchemy'} if has_kind else {}
    registry = make_registry(
        ('sqlalchemy', {'metadata': own, 'session': 'mine'}),
        autocommit=autocommit,
        outbox_session='theirs',
        **settings,
    )
    assert storage_of(registry)._session == 'theirs'
    assert storage_of(registry).table is own.tables[TABLE]


def test_setting_of_another_kind():
    """The options of the directive are not for it."""
    registry = make_registry(('zodb', {'database': 'other'}), outbox='sqlalchemy')
    assert isinstance(storage_of(registry), SQLAlchemyStorage)


@pytest.mark.parametrize('kind', ['none', None])
@pytest.mark.parametrize('autocommit', [True, False])
def test_none(kind, autocommit):
    registry = make_registry((kind, {}), autocommit=autocommit, outbox_session='db')
    check_outbox_settings(registry)
    assert registry.zmq_clients.outbox is None
    assert shown(registry) == ("ZMQ outbox 'none'", {'kind': 'none'})


def test_setting_overrides_none():
    assert storage_of(make_registry(('none', {}), outbox='sqlalchemy'))


def test_setting_none():
    """It is enough to change one setting, for a test for instance."""
    config = make_config(outbox='none', outbox_session='db', outbox_metadata=HERE)
    config.include(lambda config: config.set_zmq_outbox('sqlalchemy', metadata=HERE), 'package')
    assert config.make_wsgi_app().registry.zmq_outbox is None


@pytest.mark.parametrize('autocommit', [True, False])
def test_second_commit_replaces_it(autocommit):
    config = make_config(('sqlalchemy', {'session': 'first'}), autocommit=autocommit)
    for session in ('second', 'third'):
        config.commit()
        config.set_zmq_outbox('sqlalchemy', session=session)
    config.commit()
    assert storage_of(config.registry)._session == 'third'
    config.set_zmq_outbox('none')
    config.commit()
    assert config.registry.zmq_outbox_factory is None


def test_directive_after_its_settings():
    """With autocommit the settings are read first, when it is not known what code will choose."""
    config = make_config(autocommit=True, outbox_session='theirs')
    config.set_zmq_outbox('sqlalchemy', session='mine')
    app = config.make_wsgi_app()
    app.registry.zmq_clients.close()
    assert storage_of(app.registry)._session == 'theirs'


def test_conflict():
    config = make_config(('sqlalchemy', {}), ('zodb', {}))
    with pytest.raises(ConfigurationConflictError) as caught:
        config.commit()
    assert 'For: zmq_outbox\n' in str(caught.value)
    assert str(caught.value).count(__file__) == 2


def test_application_overrides_a_package():
    config = make_config()
    config.include(lambda config: config.set_zmq_outbox('sqlalchemy', session='mine'), 'package')
    config.set_zmq_outbox('sqlalchemy', session='theirs')
    config.commit()
    assert storage_of(config.registry)._session == 'theirs'


def test_no_secret_is_shown():
    engine = sql.create_engine('postgresql+psycopg://user:hush@localhost/app')
    registry = make_registry(('sqlalchemy', {'engine': engine}))
    assert storage_of(registry)._find_engine() is engine
    assert 'hush' not in str(shown(registry))


# Errors


@pytest.mark.parametrize(
    ('directives', 'settings', 'text'),
    [
        ([('sqlalchmy', {})], {}, "'sqlalchmy' (config.set_zmq_outbox): did you mean sqlalchemy?"),
        ([], {'outbox': 'zdb'}, "Bad outbox 'zdb' (setting pyams_zmq.outbox): did you mean zodb?"),
        (
            [('zodb', {})],
            {'outbox': 'redis'},
            "Bad outbox 'redis' (setting pyams_zmq.outbox): write sqlalchemy, zodb, none",
        ),
        ([(3, {})], {}, 'Bad outbox 3 (config.set_zmq_outbox): write sqlalchemy, zodb, none'),
        (
            [('sqlalchemy', {'table': 'outbox'})],
            {},
            "Unknown option 'table' of the outbox sqlalchemy (config.set_zmq_outbox): it has "
            'session, metadata, engine',
        ),
        (
            [('zodb', {'database': 'main'})],
            {'outbox_session': 'db'},
            "Unknown option 'session' of the outbox zodb (setting pyams_zmq.outbox_session): it "
            'has database',
        ),
        (
            [],
            {'outbox': 'sqlalchemy', 'outbox_database': 'main'},
            "Unknown option 'database' of the outbox sqlalchemy (setting "
            'pyams_zmq.outbox_database): it has session, metadata, engine',
        ),
        (
            [],
            {'outbox': 'sqlalchemy', 'outbox_metadata': 'no_module.metadata'},
            "Bad metadata of the outbox 'no_module.metadata' (setting pyams_zmq.outbox_metadata): "
            "No module named 'no_module'",
        ),
        (
            [('sqlalchemy', {'metadata': f'{HERE}_of_tables'})],
            {},
            f"Bad metadata of the outbox '{HERE}_of_tables' (config.set_zmq_outbox): ",
        ),
        (
            [],
            {'outbox': 'sqlalchemy', 'outbox_metadata': '.metadata.'},
            "Bad metadata of the outbox '.metadata.' (setting pyams_zmq.outbox_metadata): ",
        ),
        (
            [('sqlalchemy', {})],
            {'outbox_metadata': f'{__name__}.find_session'},
            'The outbox sqlalchemy (config.set_zmq_outbox) cannot be used: <function find_session ',
        ),
        (
            [('sqlalchemy', {'engine': 'sqlite:///user:hush@app.sqlite'})],
            {},
            'The outbox sqlalchemy (config.set_zmq_outbox) cannot be used: its engine is of '
            "<class 'str'>, not an Engine of SQLAlchemy",
        ),
    ],
    ids=lambda value: next(iter(value.values()), 'directive') if isinstance(value, dict) else '',
)
@pytest.mark.parametrize('autocommit', [True, False])
def test_errors(directives, settings, text, autocommit):
    with pytest.raises(ConfigurationError) as caught:
        make_registry(*directives, autocommit=autocommit, **settings)
    assert text in str(caught.value)
    assert 'hush' not in str(caught.value)


@pytest.mark.parametrize('name', ['session', 'metadata', 'database'])
def test_option_without_an_outbox(name):
    config = make_config(**{f'outbox_{name}': 'x'})
    with pytest.raises(ConfigurationError) as caught:
        config.make_wsgi_app()
    assert str(caught.value) == (
        f'Setting pyams_zmq.outbox_{name} has no effect: set pyams_zmq.outbox, too, or call '
        'config.set_zmq_outbox'
    )


@pytest.mark.parametrize(
    ('kind', 'package', 'modules', 'remedy'),
    [
        ('sqlalchemy', 'sqlalchemy', ['sqlalchemy'], 'install pyams_zmq[sqlalchemy]'),
        (
            'sqlalchemy',
            'zope.sqlalchemy',
            ['sqlalchemy', 'sql_session'],
            'install pyams_zmq[sqlalchemy]',
        ),
        ('zodb', 'BTrees.OOBTree', ['zodb'], 'needs the package ZODB'),
        ('zodb', 'ZODB', ['zodb', 'zodb_connection'], 'needs the package ZODB'),
        ('zodb', 'ZODB.Connection', ['zodb', 'zodb_connection'], 'needs the package ZODB'),
    ],
)
def test_package_that_is_not_installed(monkeypatch, kind, package, modules, remedy):
    monkeypatch.setitem(sys.modules, package, None)  # as for Python: it cannot be imported
    for module in [name for name in sys.modules if name.startswith(f'{package}.')]:
        monkeypatch.delitem(sys.modules, module)
    for module in modules:
        monkeypatch.delitem(sys.modules, f'pyams_zmq.outbox.{module}', raising=False)
    with pytest.raises(ConfigurationError) as caught:
        make_registry(outbox=kind)
    assert f'The outbox {kind} (setting pyams_zmq.outbox) cannot be used: ' in str(caught.value)
    assert remedy in str(caught.value)


INI = f"""
[app:main]
use = call:{__name__}:make_app
{{settings}}
"""


def make_app(global_config, **settings):
    """Make an application."""
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        return config.make_wsgi_app()


@pytest.mark.parametrize(
    ('settings', 'text'),
    [
        (['outbox = redis'], "Bad outbox 'redis' (setting pyams_zmq.outbox{place}): write "),
        (
            ['outbox = sqlalchemy', 'outbox_metadata = none.metadata'],
            "Bad metadata of the outbox 'none.metadata' (setting pyams_zmq.outbox_metadata{place})",
        ),
        (['outbox_session = db'], 'Setting pyams_zmq.outbox_session{place} has no effect: '),
        (
            ['outbox = zodb', 'outbox_session = db'],
            "Unknown option 'session' of the outbox zodb (setting pyams_zmq.outbox_session{place})",
        ),
        (
            ['outbox_sesion = x'],
            "'pyams_zmq.outbox_sesion'{place}: did you mean pyams_zmq.outbox_s",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else '',
)
def test_place_of_an_error(tmp_path, settings, text):
    ini = tmp_path / 'app.ini'
    ini.write_text(INI.format(settings='\n'.join(f'pyams_zmq.{line}' for line in settings)))
    with pytest.raises(ConfigurationError) as caught:
        get_app(str(ini))
    assert text.format(place=f' in {ini}, section main') in str(caught.value)


# The names of general settings


@pytest.mark.parametrize(
    ('setting', 'advice'),
    [
        ('outbx', 'did you mean pyams_zmq.outbox?'),
        ('Outbox', 'did you mean pyams_zmq.outbox?'),
        ('outbox_sesion', 'did you mean pyams_zmq.outbox_session?'),
        ('outbox_meta_data', 'did you mean pyams_zmq.outbox_metadata?'),
        ('outbox.session', 'did you mean pyams_zmq.outbox_session?'),
        ('outbox.databse', 'did you mean pyams_zmq.outbox_database?'),
        ('aplication', 'did you mean pyams_zmq.application?'),
        (
            'debug',
            'write pyams_zmq.application, pyams_zmq.outbox, pyams_zmq.outbox_session, '
            'pyams_zmq.outbox_metadata, pyams_zmq.outbox_database, or pyams_zmq.NAME.OPTION',
        ),
        ('outbox.adress', 'did you mean pyams_zmq.outbox.address?'),
        ('outbox.x', 'write pyams_zmq.outbox.OPTION with one of these: address, '),
    ],
)
def test_misspelt_setting(setting, advice):
    with pytest.raises(ConfigurationError) as caught:
        make_registry(**{setting: 'x'})
    assert f"Unknown setting 'pyams_zmq.{setting}': {advice}" in str(caught.value)


# The database for the background


def test_engine_of_the_session_factory(tmp_path):
    engine = sql.create_engine(f'sqlite:///{tmp_path}/app.sqlite')
    registry = make_registry(outbox='sqlalchemy')
    assert registry.zmq_clients.outbox is registry.zmq_clients.outbox
    find = storage_of(registry)._engine
    assert find() is None
    registry['dbsession_factory'] = sql.orm.sessionmaker(engine)
    assert find() is engine
    registry['dbsession_factory'] = sql.orm.scoped_session(sql.orm.sessionmaker(engine))
    assert find() is engine
    with engine.connect() as connection:  # as a functional test may bind its sessions
        registry['dbsession_factory'] = sql.orm.sessionmaker(connection)
        assert find() is engine
    registry['dbsession_factory'] = sql.orm.sessionmaker()  # each request binds its session
    assert find() is None
    table = storage_of(registry).table
    registry['dbsession_factory'] = sql.orm.sessionmaker(binds={table: engine})
    assert find() is engine
    engine.dispose()
