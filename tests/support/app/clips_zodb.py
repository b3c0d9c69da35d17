# SPDX-License-Identifier: ZPL-2.1
"""The clips of an application in a ZODB, which pyramid_zodbconn opens."""

from contextlib import closing

import transaction
from BTrees.OOBTree import OOBTree
from pyramid_zodbconn import get_connection


def add_clip(request, name):
    """Add a clip in the transaction of a request."""
    root = get_connection(request).root()
    if 'clips' not in root:
        root['clips'] = OOBTree()
    root['clips'][name] = None


def read_clips(registry):
    """Return the names of the clips that are committed."""
    manager = transaction.TransactionManager()
    with closing(registry._zodb_databases[''].open(manager)) as connection:
        names = list(connection.root().get('clips', ()))
        manager.abort()
        return names


def close(registry):
    """Close the database."""
    registry._zodb_databases[''].close()


def includeme(config):
    """Let an application have clips."""
    config.include('pyramid_zodbconn')
    config.add_request_method(add_clip)
    config.set_zmq_outbox('zodb')
