# SPDX-License-Identifier: ZPL-2.1
"""The ZODB connection of a transaction, in which the outbox is written."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ZODB.Connection import Connection

from pyams_zmq.exceptions import ZMQOutboxError


class ConnectionFinder:
    """Finds the connection that takes part in a transaction.

    :param database: name of the database in a multi-database; by default the one by which the
        others were opened
    :param connection: name of the attribute of a request that has the connection, or a callable
        that returns the connection of a request; by default it is looked for
    """

    def __init__(self, database: str | None, connection: str | Callable[[Any], Any] | None):
        self._database = database
        self._connection = connection

    def find(self, manager: Any, request: Any, known: Any) -> Any:
        """Return the connection.

        :param manager: the transaction manager
        :param request: the request, or None
        :param known: the database that already has the outbox, or None
        :raises ZMQOutboxError: if it is not found
        """
        if self._connection is not None:
            connections = [_check(self._connection_of(request), manager)]
        else:
            found = list_connections(manager) or _open(manager, request)
            # The one by which the others of a multi-database were opened is the first there.
            connections = [next(iter(each.connections.values())) for each in found]
        if self._database is not None:
            return _get_named(connections, self._database)
        if len({id(each.db()) for each in connections}) > 1:
            return _get_known(connections, known)
        return connections[0]

    def _connection_of(self, request: Any) -> Any:
        """Return the connection of a request, as the constructor was told."""
        if callable(self._connection):
            found, source = self._connection(request), f'The result of {self._connection!r}'
        else:
            found = getattr(request, str(self._connection), None)
            source = f'The attribute {self._connection!r} of the request'
        if not isinstance(found, Connection):
            raise ZMQOutboxError(
                f'{source} is not a ZODB connection but {type(found).__name__}: correct the '
                'argument "connection" of the outbox'
            )
        return found


def list_connections(manager: Any) -> list[Any]:
    """Return the connections that can write in the current transaction of a manager.

    Those that have joined the transaction come first, then others that were opened with its
    manager. The package transaction has no public attributes for these two questions.
    """
    transaction = manager.get()
    found = list(transaction._resources)
    transaction._synchronizers.map(found.append)
    unique = {id(each): each for each in found if isinstance(each, Connection)}
    return [each for each in unique.values() if not each.isReadOnly()]


def _open(manager: Any, request: Any) -> list[Any]:
    """Return the connection that pyramid_zodbconn opens for a request."""
    if not getattr(getattr(request, 'registry', None), '_zodb_databases', None):
        raise ZMQOutboxError(
            'No ZODB connection takes part in the transaction, so that the outbox cannot be '
            'written: open one with its transaction manager before, or include pyramid_zodbconn'
        )
    # An option of the application, which has imported it.
    return [_check(import_module('pyramid_zodbconn').get_connection(request), manager)]


def _check(connection: Any, manager: Any) -> Any:
    """Return a connection; raise if another transaction manager commits it."""
    # The manager of a thread is a wrapper, and connections may have what is in it.
    own = connection.transaction_manager
    if getattr(own, 'manager', own) is not getattr(manager, 'manager', manager):
        raise ZMQOutboxError(
            'The ZODB connection of the request does not take part in the transaction of the '
            'message: open it with the same transaction manager, which is request.tm with '
            'pyramid_tm'
        )
    return connection


def _get_named(connections: Sequence[Any], name: str) -> Any:
    """Return the connection to a database of a multi-database."""
    for each in connections:
        if name in each.db().databases:
            return each.get_connection(name)
    names = sorted({repr(other) for each in connections for other in each.db().databases})
    raise ZMQOutboxError(
        f'The ZODB database {name!r} of the outbox does not take part in the transaction, only '
        f'{", ".join(names)}: correct the name'
    )


def _get_known(connections: Sequence[Any], known: Any) -> Any:
    """Return the connection to the database that has the outbox; there are several databases."""
    for each in connections:
        if each.db() is known:
            return each
    names = sorted({repr(each.db().database_name) for each in connections})
    raise ZMQOutboxError(
        f'Several ZODB databases take part in the transaction ({", ".join(names)}), and it is not '
        'known which has the outbox: give the outbox its database, or the name of that'
    )
