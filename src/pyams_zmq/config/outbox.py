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
    from pyams_zmq.outbox.sqlalchemy import (  # noqa: PLC0415 - it needs packages of an extra
        SQLAlchemyStorage,
        find_engine,
        outbox_table,
    )

    if metadata is not None:
        outbox_table(metadata)  # now, so that create_all knows it
    if not (engine is None or callable(engine) or hasattr(engine, 'connect')):
        raise TypeError(f'its engine is of {type(engine)}, not an Engine of SQLAlchemy')

    def make(application: str) -> Storage:
        storage: SQLAlchemyStorage = SQLAlchemyStorage(
            application,
            session=session,
            metadata=metadata,
            # Pyramid's cookiecutter registers its session factory under this name.
            engine=engine
            or (lambda: find_engine(registry.get('dbsession_factory'), storage.table)),
        )
        return storage

    return make


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
    `pyams_zmq.outbox_database` override the arguments; options that are for another kind than that
    of the setting have no effect.

    :param kind: `'sqlalchemy'`, `'zodb'` or `'none'`
    :param options: for SQLAlchemy `session`, the name of the attribute of a request that has its
        session, by default `dbsession`, or a function of the request; `metadata`, the metadata that
        gets the table, or its dotted name; and `engine`, by default that of
        `registry['dbsession_factory']`, or of the first session that sends. For ZODB `database`,
        the name of one of several databases
    :raises pyramid.exceptions.ConfigurationError: for another kind or option, or if a package is
        not installed
    """
    _choose(config, kind or NONE, options)


def set_outbox_from_settings(config: Any, order: int) -> None:
    """Choose the outbox that settings name, if code has not chosen one.

    With `autocommit`, or after a `commit`, this runs before code that chooses one later.

    :param order: order of the action
    """
    is_chosen = config.registry.zmq_outbox_kind is not None
    if not is_chosen and is_set(config.registry.settings or {}, OUTBOX):
        with as_settings(config):
            _choose(config, NONE, {}, order)


def _choose(config: Any, kind: str, options: dict[str, Any], order: int = 0) -> None:
    introspectable = config.introspectable(
        'ZMQ outbox', 'zmq_outbox', f'ZMQ outbox {kind!r}', 'outbox'
    )

    def register() -> None:
        choice = _Choice.read(config, kind, options)
        config.registry.zmq_outbox_factory = choice.prepare(config)
        config.registry.zmq_outbox_kind = choice.kind
        introspectable.title = f'ZMQ outbox {choice.kind!r}'
        introspectable.update(kind=choice.kind, **choice.options)

    config.action('zmq_outbox', register, introspectables=(introspectable,), order=order)


class _Choice(NamedTuple):
    """The outbox that code and settings have chosen.

    :ivar kind: its kind
    :ivar place: where that is chosen
    :ivar options: its options
    :ivar places: where these are set
    """

    kind: str
    place: str
    options: dict[str, Any]
    places: dict[str, str]

    def __repr__(self) -> str:
        return f'<outbox {self.kind!r} ({self.place})>'  # options may have a password

    @classmethod
    def read(cls, config: Any, kind: str, options: dict[str, Any]) -> '_Choice':
        """Return what settings make of the arguments of the directive.

        :raises ConfigurationError: for an unknown kind or option
        """
        settings = config.registry.settings or {}
        place = 'config.set_zmq_outbox'
        places = dict.fromkeys(options, place)
        values = dict(options)
        if is_set(settings, OUTBOX):
            place = f'setting {locate(OUTBOX)}'
            if settings[OUTBOX] != kind:
                kind, values = settings[OUTBOX], {}
        _check_kind(kind, place)
        if kind == NONE:
            return cls(kind, place, {}, {})
        for name in _list_given(settings):
            option = _SETTINGS[name]
            values[option], places[option] = settings[name], f'setting {locate(name)}'
        for option in values:
            if option not in _KINDS[kind].options:
                raise ConfigurationError(
                    f'Unknown option {option!r} of the outbox {kind} ({places[option]}): it has '
                    f'{", ".join(_KINDS[kind].options)}'
                )
        return cls(kind, place, values, places)

    def prepare(self, config: Any) -> Callable[[str], Storage] | None:
        """Return the function that makes the storage; None without an outbox.

        :raises ConfigurationError: for a bad option, or if a package is not installed
        """
        if self.kind == NONE:
            return None
        metadata = self.options.get('metadata')
        try:
            if metadata is not None:
                self.options['metadata'] = config.maybe_dotted(metadata)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f'Bad metadata of the outbox {metadata!r} ({self.places["metadata"]}): {error}'
            ) from error
        try:
            return _KINDS[self.kind].prepare(config.registry, **self.options)
        except (ImportError, TypeError) as error:
            raise ConfigurationError(
                f'The outbox {self.kind} ({self.place}) cannot be used: {error}'
            ) from error


def _check_kind(kind: str, place: str) -> None:
    kinds = [*_KINDS, NONE]
    if kind not in kinds:
        similar = get_close_matches(str(kind), kinds, 1)
        advice = f'did you mean {similar[0]}?' if similar else f'write {", ".join(kinds)}'
        raise ConfigurationError(f'Bad outbox {kind!r} ({place}): {advice}')


def _list_given(settings: Any) -> list[str]:
    return [name for name in _SETTINGS if is_set(settings, name)]


def check_outbox_settings(registry: Any) -> None:
    """Check that settings with options of an outbox have an effect.

    :param registry: registry of the application, which is complete
    :raises ConfigurationError: if neither code nor a setting has chosen an outbox
    """
    settings = registry.settings or {}
    given = _list_given(settings)
    if given and registry.zmq_outbox_kind is None:
        raise ConfigurationError(
            f'Setting {locate(given[0])} has no effect: set {OUTBOX}, too, or call '
            'config.set_zmq_outbox'
        )


def make_outbox(
    registry: Any, application: Application | None, find_client: Callable[[str], Any]
) -> Outbox | None:
    """Return the outbox of an application; None if it has not chosen one.

    :param application: the application, None to identify it now
    :param find_client: returns the client of a service
    """
    make = registry.zmq_outbox_factory
    if make is None:
        return None
    # Not its name, which changes with each setting if it has no ini file.
    name = (application or identify(registry)).description
    return Outbox(make(name), find_client, name)
