# SPDX-License-Identifier: ZPL-2.1
"""The clips of an application in a ZODB, which pyramid_zodbconn opens."""

from contextlib import closing

import transaction
from BTrees.Length import Length
from BTrees.OOBTree import OOBTree
from pyramid_zodbconn import get_connection


def add_clip(request, name):
    """Add a clip in the transaction of a request."""
    root = get_connection(request).root()
    if 'clips' not in root:
        root['clips'] = OOBTree()
    root['clips'][name] = None


def make_counters(registry, names):
    """Make counters, each an object of its own."""
    with registry._zodb_databases[''].transaction() as connection:
        connection.root()['counters'] = {name: Length() for name in names}


def count(request, name):
    """Raise a counter in the transaction of a request."""
    get_connection(request).root()['counters'][name].value += 1


def read_counters(registry):
    """Return the values of the counters that are committed."""
    with registry._zodb_databases[''].transaction() as connection:
        return {name: each.value for name, each in connection.root()['counters'].items()}


def read_clips(registry):
    """Return the names of the clips that are committed."""
    manager = transaction.TransactionManager()
    with closing(registry._zodb_databases[''].open(manager)) as connection:
        names = list(connection.root().get('clips', ()))
        manager.abort()
        return names


def close(registry):
    """Close all databases."""
    for database in registry._zodb_databases.values():
        database.close()


def includeme(config):
    """Let an application have clips."""
    config.include('pyramid_zodbconn')
    config.add_request_method(add_clip)
    config.add_request_method(count)
    config.set_zmq_outbox('zodb')
