# SPDX-License-Identifier: ZPL-2.1
"""The outbox of an application: ``config.set_zmq_outbox(...)``, and the settings for it."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

from pyramid.config.actions import action_method
from pyramid.exceptions import ConfigurationError

from pyams_zmq.config.errors import as_settings, is_set, locate
from pyams_zmq.config.identity import Application, identify
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.storage import Storage

OUTBOX = 'pyams_zmq.outbox'
"""Setting with the kind of the outbox"""

NONE = 'none'

_SETTINGS = {
    'pyams_zmq.outbox_session': 'session',
    'pyams_zmq.outbox_metadata': 'metadata',
    'pyams_zmq.outbox_database': 'database',
}
"""Settings with an option of an outbox"""

OUTBOX_SETTINGS = (OUTBOX, *_SETTINGS)


class _Kind(NamedTuple):
    """A kind of outbox.

    :ivar options: its options, those of the directive and of settings
    :ivar prepare: returns a function that makes the storage, from the name of the application; it
        is called by the configuration, and raises ImportError without the packages of the database
    """

    options: tuple[str, ...]
    prepare: Callable[..., Callable[[str], Storage]]


def _prepare_sqlalchemy(
    registry: Any, *, session: Any = 'dbsession', metadata: Any = None, engine: Any = None
) -> Callable[[str], Storage]:
    from pyams_zmq.outbox.sqlalchemy import (  # noqa: PLC0415 - of an extra
        SQLAlchemyStorage,
        outbox_table,
    )

    if metadata is not None:
        outbox_table(metadata)  # so that create_all and Alembic know it
    if engine is None:
        engine = partial(_find_engine, registry)
    return partial(SQLAlchemyStorage, session=session, metadata=metadata, engine=engine)


def _find_engine(registry: Any) -> Any:
    """Return the engine of the session factory that Pyramid's cookiecutter registers, if any."""
    make_session = registry.get('dbsession_factory')
    if make_session is None:
        return None
    session = make_session()
    try:
        return session.get_bind()
    finally:
        session.close()


def _prepare_zodb(registry: Any, *, database: str | None = None) -> Callable[[str], Storage]:
    from pyams_zmq.outbox.zodb import ZODBStorage  # noqa: PLC0415 - it need not be installed

    return partial(ZODBStorage, database=database, db=partial(_find_database, registry))


def _find_database(registry: Any) -> Any:
    """Return the database that pyramid_zodbconn has opened, if any."""
    return (getattr(registry, '_zodb_databases', None) or {}).get('')


_KINDS = {
    'sqlalchemy': _Kind(('session', 'metadata', 'engine'), _prepare_sqlalchemy),
    'zodb': _Kind(('database',), _prepare_zodb),
}


@action_method  # type: ignore[untyped-decorator] # Pyramid has no types
def set_zmq_outbox(config: Any, kind: str | None, **options: Any) -> None:
    """Choose the outbox of the application; a directive of the configurator.

    The settings `pyams_zmq.outbox`, `pyams_zmq.outbox_session`, `pyams_zmq.outbox_metadata` and
    `pyams_zmq.outbox_database` override the arguments.

    :param kind: `'sqlalchemy'`, `'zodb'` or `'none'`
    :param options: for SQLAlchemy `session`, the name of the attribute of a request that has its
        session, by default `dbsession`, or a function of the request; `metadata`, the metadata that
        gets the table, or its dotted name; and `engine`, by default that of
        `registry['dbsession_factory']`, or of the first session that sends. For ZODB `database`,
        the name of one of several databases
    :raises pyramid.exceptions.ConfigurationError: for another kind or option, or if a package is
        not installed
    """

    def register() -> None:
        _register(config, kind, options, 'config.set_zmq_outbox')

    config.action('zmq_outbox', register)


def set_outbox_from_settings(config: Any) -> None:
    """Choose the outbox that settings name, if code has not chosen one."""
    if getattr(config.registry, 'zmq_outbox_factory', None) is None:
        with as_settings(config):
            _register(config, None, {}, '')


def _register(config: Any, kind: Any, options: dict[str, Any], directive: str) -> None:
    settings = config.registry.settings or {}
    place = directive
    if is_set(settings, OUTBOX):
        kind, place = settings[OUTBOX], f'setting {locate(OUTBOX)}'
    given = {name: option for name, option in _SETTINGS.items() if is_set(settings, name)}
    if kind in (None, NONE):
        if given and kind is None:
            raise ConfigurationError(
                f'Setting {locate(next(iter(given)))} has no effect: set {OUTBOX}, too'
            )
        return
    if kind not in _KINDS:
        similar = get_close_matches(str(kind), [*_KINDS, NONE], 1)
        usual = f'write {", ".join(_KINDS)} or {NONE}'
        advice = f'did you mean {similar[0]}?' if similar else usual
        raise ConfigurationError(f'Bad outbox {kind!r} ({place}): {advice}')
    known = _KINDS[kind]
    values = dict(options)
    values.update({option: settings[name] for name, option in given.items()})
    sources = {option: f'setting {locate(name)}' for name, option in given.items()}
    for option in values:
        if option not in known.options:
            raise ConfigurationError(
                f'Unknown option {option!r} of the outbox {kind} '
                f'({sources.get(option, directive)}): it has {", ".join(known.options)}'
            )
    try:
        if values.get('metadata') is not None:
            values['metadata'] = config.maybe_dotted(values['metadata'])
        make = known.prepare(config.registry, **values)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigurationError(f'The outbox {kind} ({place}) cannot be used: {error}') from error
    config.registry.zmq_outbox_factory = make


def make_outbox(
    registry: Any, application: Application | None, find_client: Callable[[str], Any]
) -> Outbox | None:
    """Return the outbox of an application; None if it has not chosen one.

    :param application: the application, None to identify it now
    :param find_client: returns the client of a service
    """
    make = getattr(registry, 'zmq_outbox_factory', None)
    if make is None:
        return None
    name = (application or identify(registry)).name
    return Outbox(make(name), find_client, name)
