# SPDX-License-Identifier: ZPL-2.1
"""The options of a service: one table for the directive, the settings, errors and documentation."""

from dataclasses import fields
from enum import Enum
from typing import Any, NamedTuple

import msgspec

from pyams_zmq.config.kinds import (
    ADDRESS,
    ADDRESSES,
    BOOLEAN,
    CLASS,
    DURATION,
    FILE,
    GROUP,
    HANDLER,
    INTEGER,
    INTERVAL,
    KEYS,
    MODE,
    NAMES,
    NUMBER,
    POSITIVE,
    PUBLIC_KEY,
    PUBLIC_KEYS,
    SECRET_KEY,
    START,
    USER,
    USERS,
    Kind,
)
from pyams_zmq.config.service import Service
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess

PREFIX = 'pyams_zmq.'
"""A setting is `pyams_zmq.NAME.OPTION`, with the name of a service"""


class Group(Enum):
    """What an option is about; the value is a heading of the documentation."""

    SERVICE = 'Service'
    ACCESS = 'Access'
    CLIENT = 'Clients of the application'
    POOL = 'Pools'
    JOBS = 'Jobs of pools'
    LIMITS = 'Limits'
    POOL_LIMITS = 'Limits of pools'


class Option(NamedTuple):
    """An option of a service: an argument of the directive, and a setting.

    :ivar text: its meaning
    :ivar unit: unit of a number, in the plural
    :ivar default: description of the default, unless the class has it
    """

    group: Group
    name: str
    kind: Kind
    unit: str
    default: str
    text: str

    @property
    def is_limit(self) -> bool:
        """True for an attribute of the process, False for an argument of its constructor."""
        return self.group in (Group.JOBS, Group.LIMITS, Group.POOL_LIMITS)

    @property
    def is_for_pools(self) -> bool:
        """True if only pools have it."""
        return self.group in (Group.POOL, Group.JOBS, Group.POOL_LIMITS)

    @property
    def defaults(self) -> list[Any]:
        """Value that the class has, or those of processes and pools."""
        if not self.is_limit:
            return [field.default for field in fields(Service) if field.name == self.name]
        classes = (ZMQPool,) if self.is_for_pools else (ZMQProcess, ZMQPool)
        return list(dict.fromkeys(getattr(each, self.name) for each in classes))

    def read(self, value: Any, config: Any = None) -> Any:
        """Return a value, checked and converted to its type.

        :param config: configurator, None on the command line
        :raises ValueError, TypeError: if it is not allowed; the text says what is
        """
        try:
            return self.kind.read(value, config)
        except msgspec.ValidationError as error:
            unit = f' ({self.unit})' if self.unit else ''
            raise ValueError(
                f'{value!r} is not allowed. {error}; write {self.kind.label}{unit}'
            ) from None


_SERVICE = (
    ('address', ADDRESS, '', 'required', 'where it binds, with a port; clients connect to it'),
    ('handler', HANDLER, '', 'required', 'handler of the messages; not needed with start = never'),
    ('factory', CLASS, '', 'ZMQProcess; with workers ZMQPool', 'class of the process'),
    (
        *('start', START, '', ''),
        'who starts it: the application, pyams_zmq serve, or none of them',
    ),
)
_ACCESS = (
    ('auth', USERS, '', 'all users', 'users that may connect'),
    ('auth_file', FILE, '', '', 'file of these users, read again at SIGHUP; instead of auth'),
    ('clients', ADDRESSES, '', 'all addresses', 'addresses that may connect'),
    ('curve', KEYS, '', '', 'a CurveServer: keys of the service and its clients'),
    ('server_key', SECRET_KEY, '', '', 'secret key of the service; instead of curve'),
    (
        *('client_keys', PUBLIC_KEYS, '', 'required with server_key'),
        'public keys of the clients that may connect; a folder is read again at SIGHUP',
    ),
)
_CLIENT = (
    ('client_auth', USER, '', 'the first user of the service', 'user of this application'),
    ('client_auth_file', FILE, '', '', 'file of this user; instead of client_auth'),
    ('client_curve', KEYS, '', '', 'a CurveClient: keys of this application and the service'),
    ('client_key', SECRET_KEY, '', '', 'secret key of this application; instead of client_curve'),
    (
        *('server_public_key', PUBLIC_KEY, '', 'required with client_key'),
        'public key of the service',
    ),
    ('timeout', DURATION, 'seconds', '', 'time that a call may take'),
    (
        *('connect_timeout', DURATION, 'seconds', ''),
        'part of it after which a call fails if no service answers',
    ),
    ('retries', INTEGER, 'attempts', '', 'further attempts of a call that fails'),
    ('send_deadline', BOOLEAN, '', '', 'true to send the deadline of each call to the service'),
)
_POOL = (
    ('workers', INTEGER, 'processes', '', 'workers on this machine; 0 for a single process'),
    ('worker_address', ADDRESS, '', '', 'where a pool binds for workers of other machines'),
    ('worker_auth', USERS, '', '', 'users that may connect as workers'),
    (
        *('worker_auth_file', FILE, '', ''),
        'file of these users, read again at SIGHUP; instead of worker_auth',
    ),
    ('worker_curve', KEYS, '', '', 'a CurveServer: keys of the pool and its workers'),
    ('worker_server_key', SECRET_KEY, '', '', 'secret key of the pool; instead of worker_curve'),
    (
        *('worker_client_keys', PUBLIC_KEYS, '', 'required with worker_server_key'),
        'public keys of the workers that may connect; a folder is read again at SIGHUP',
    ),
)
_LIMITS = (
    ('concurrency', POSITIVE, 'messages', '', 'handled at a time, in each worker of a pool'),
    ('drain_timeout', NUMBER, 'seconds', '', 'for messages in hand when the service stops'),
    ('orphan_timeout', NUMBER, 'seconds', '', 'for messages in hand when its owner has died'),
    (
        *('overdue_grace', NUMBER, 'seconds', ''),
        'after the time limit of a method, until its process is replaced',
    ),
    ('max_message_size', INTEGER, 'bytes', '', 'of the largest message that is handled'),
    ('max_subscription_size', INTEGER, 'bytes', '', 'of the largest message to a PUB or XPUB'),
    (
        *('stats_users', NAMES, '', 'none'),
        'users that may read the statistics, reload the service and manage all jobs from elsewhere',
    ),
    ('bind_timeout', NUMBER, 'seconds', '', 'to wait, as a standby, for an address in use'),
    ('handshake_timeout', NUMBER, 'seconds', '', 'until a peer without a handshake must go'),
    (
        *('heartbeat_interval', NUMBER, 'seconds', ''),
        'of silence until the system checks that the host of a peer lives',
    ),
    ('heartbeat_timeout', NUMBER, 'seconds', '', 'until a host that does not answer must go'),
    (
        *('receive_hwm', INTEGER, 'messages', ''),
        'that wait to be read, for each peer whose bytes are not counted',
    ),
    ('receive_size', INTEGER, 'bytes', '', 'that wait to be read, for each peer'),
    (
        *('send_hwm', INTEGER, 'messages', ''),
        'that wait to be sent, for each peer whose bytes are not counted',
    ),
    ('send_size', INTEGER, 'bytes', '', 'that wait to be sent, for each peer'),
    ('max_connections', INTEGER, 'connections', '', 'of each address; then idle ones are closed'),
    ('backlog', INTEGER, 'connections', '', 'that wait to be accepted'),
    ('ipc_mode', MODE, '', 'by the umask; 0660 with ipc_group', 'mode of a socket file'),
    ('ipc_group', GROUP, '', 'that of the process', 'group of a socket file'),
)
_JOBS = (
    ('journal', FILE, '', '', 'where jobs are kept; made if it is missing, on a local disk'),
    (
        *('journal_size', INTEGER, 'bytes', ''),
        'of the journal, above which no job is accepted; 0 for no limit',
    ),
    (
        *('jobs', POSITIVE, 'jobs', '1 less than all workers can run, at least 1'),
        'at a time; the rest is for calls',
    ),
    ('keep', DURATION, 'days', '', 'that jobs which have ended are kept'),
    (
        *('cancel_grace', NUMBER, 'seconds', ''),
        'from a cancel until the worker of a job that does not end is killed',
    ),
)
_POOL_LIMITS = (
    ('queue_limit', INTEGER, 'calls', '', 'that wait for a worker; further ones get 503'),
    ('queue_size', INTEGER, 'bytes', '', 'of the calls that wait; further ones get 503'),
    ('client_queue_size', INTEGER, 'bytes', '', 'of the calls of one connection that wait'),
    ('max_reply_size', INTEGER, 'bytes', '', 'of the largest reply of a worker'),
    ('max_calls', INTEGER, 'calls', '', 'after which a worker is replaced; 0 for no limit'),
    ('max_memory', NUMBER, 'MiB', '', 'above which a worker is replaced; 0 for no limit'),
    ('beat_interval', INTERVAL, 'seconds', '', 'between two heartbeats of a worker'),
)

OPTIONS = {
    row[0]: Option(group, *row)
    for group, rows in (
        (Group.SERVICE, _SERVICE),
        (Group.ACCESS, _ACCESS),
        (Group.CLIENT, _CLIENT),
        (Group.POOL, _POOL),
        (Group.JOBS, _JOBS),
        (Group.LIMITS, _LIMITS),
        (Group.POOL_LIMITS, _POOL_LIMITS),
    )
    for row in rows
}
"""All options by name: the arguments of the directive, and the keys of settings"""

FORMS = {
    'auth': ('auth_file',),
    'client_auth': ('client_auth_file',),
    'worker_auth': ('worker_auth_file',),
    'curve': ('server_key', 'client_keys'),
    'client_curve': ('client_key', 'server_public_key'),
    'worker_curve': ('worker_server_key', 'worker_client_keys'),
}
"""Options that have another form: a file of users, or the texts of a secret and public keys"""
