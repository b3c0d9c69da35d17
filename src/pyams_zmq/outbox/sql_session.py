# SPDX-License-Identifier: ZPL-2.1
"""The session of a request, and its part in the transaction of the request."""

from collections.abc import Callable
from typing import Any, TypeAlias

from sqlalchemy import Connection, Table
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, scoped_session
from zope.sqlalchemy import mark_changed
from zope.sqlalchemy.datamanager import SessionDataManager

from pyams_zmq.exceptions import ZMQOutboxError

SessionSource: TypeAlias = str | Session | scoped_session[Any] | Callable[[Any], Any]
"""Where the session is: an attribute of the request, a function of the request, or the session"""

_SETTING = 'pyams_zmq.outbox_session'


def find_session(source: SessionSource, request: Any) -> Session:
    """Return the session of a request.

    :param request: the request, or None
    :raises ZMQOutboxError: if it has none
    """
    found: Any
    if isinstance(source, str):
        found, place = _read_attribute(source, request), f'The attribute {source!r} of the request'
    elif isinstance(source, Session | scoped_session):
        found, place = source, ''
    else:
        found, place = source(request), f'The result of {source!r}'
    if isinstance(found, scoped_session):
        found = found()
    if not isinstance(found, Session):
        raise ZMQOutboxError(
            f'{place} is not a Session of SQLAlchemy, but of {type(found)}: set {_SETTING} to the '
            'attribute of the request that has it'
        )
    return found


def _read_attribute(name: str, request: Any) -> Any:
    if request is None:
        raise ZMQOutboxError(
            f'The outbox finds its Session of SQLAlchemy in the attribute {name!r} of the request: '
            'call config.set_zmq_outbox with a function that returns the Session, as session'
        )
    try:
        return getattr(request, name)
    except AttributeError as error:
        raise ZMQOutboxError(
            f'The request has no attribute {name!r} with a Session of SQLAlchemy: set {_SETTING} '
            'to the attribute of the request that has it'
        ) from error


def join_transaction(session: Session, manager: Any, table: Table) -> Connection:
    """Let a session be committed with the current transaction; return its connection for a table.

    :param manager: the transaction manager
    :raises ZMQOutboxError: if the session does not take part in the transaction
    """
    try:
        connection = session.connection(bind_arguments={'clause': table})  # it joins if registered
    except UnboundExecutionError as error:
        raise ZMQOutboxError(
            f'The Session of SQLAlchemy has no engine for the table {table.name!r}: add it to its '
            'binds, as in sessionmaker(binds={outbox_table(metadata): engine})'
        ) from error
    # `mark_changed` would join any session, but close it after the commit, and trust one that is in
    # the transaction of another manager. So look for what was joined; only `join` is public.
    participants = manager.get()._resources
    if not any(
        isinstance(each, SessionDataManager) and each.session is session for each in participants
    ):
        raise ZMQOutboxError(
            'The Session of SQLAlchemy is not committed with the transaction of the message: call '
            'zope.sqlalchemy.register(session, transaction_manager=request.tm) where it is made'
        )
    try:
        mark_changed(session, transaction_manager=manager)
    except AssertionError as error:
        raise ZMQOutboxError(
            'The Session of SQLAlchemy is registered as read only, so that the message would be '
            'lost: use another session for the outbox'
        ) from error
    return connection
