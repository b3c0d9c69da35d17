# SPDX-License-Identifier: ZPL-2.1
"""A program that commits clips with a message and a job each, until a signal or a point kills it.

Arguments: URL of the database, addresses of the services for messages and for jobs, name of the
process, and the point at which it kills itself, empty for none, with the number of the time.
"""

import os
import signal
import sys
from functools import partial, wraps
from itertools import count
from math import inf
from time import monotonic, sleep

import transaction

from checks import wait_until
from outbox_databases import make_outbox, open_database
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.transaction import send_on_commit, submit_on_commit
from pyams_zmq.outbox import relay
from pyams_zmq.outbox.sender import OutboxSender

CHECK_INTERVAL = 0.3
"""Seconds, so that the programs of a test adopt the messages of those before them"""

DRAIN = 'drain'
"""Instead of a point: send what others have left, commit nothing, and end"""

POINTS = (
    'before the vote',
    'after the vote',
    'after the finish',
    'after the post',
    'after the drop',
)


class Killer:
    """Kills this process at a point.

    :param point: one of `POINTS`; empty for none
    :param number: the number of the time at which the point is reached
    """

    def __init__(self, point, number):
        self._point = point
        self._left = number

    def reach(self, point):
        """Kill this process, if it is the point and the time."""
        if point == self._point:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)

    def after(self, point, method):
        """Return a method that reaches a point after its call."""

        @wraps(method)
        def call(*args, **kwargs):
            result = method(*args, **kwargs)
            self.reach(point)
            return result

        return call


class Participant:
    """A participant of a transaction that reaches points in the first, or in the last place."""

    def __init__(self, manager, key, **points):
        self.transaction_manager = manager
        self._key = key
        for name, reach in points.items():
            setattr(self, name, lambda _transaction, reach=reach: reach())

    def sortKey(self):  # noqa: N802 - the name of IDataManager
        return self._key

    def tpc_begin(self, transaction):
        """Do nothing."""

    abort = commit = tpc_vote = tpc_finish = tpc_abort = tpc_begin


def main(url, messages, jobs, process, point, times):
    clients = {'messages': ZMQClient(messages), 'jobs': ZMQClient(jobs)}
    killer = Killer(point, int(times))
    relay.CHECK_INTERVAL = CHECK_INTERVAL
    relay.Relay.post = killer.after('after the post', relay.Relay.post)
    with open_database(url, process) as database:
        storage = database.storage
        storage.settle = killer.after('after the drop', storage.settle)
        outbox = make_outbox(url, storage, clients.__getitem__)
        outbox.start()
        if point == DRAIN:
            drain(outbox)
            return
        manager = transaction.TransactionManager()
        for number in count():
            began = monotonic()
            commit(database, outbox, clients, manager, f'{process}.{number}', killer)
            if not number:
                print('committed', flush=True)
            # Not to wait for something: the lock of sqlite is not fair. Of two programs that write
            # without a pause, 20 ms in each transaction, one has committed once in 30 seconds.
            if url.startswith('sqlite'):
                sleep(monotonic() - began)


def drain(outbox):
    """Wait until all messages have left the outbox."""
    wait_until(lambda: not outbox.waiting(), inf)
    outbox.close()


def commit(*args):
    """Commit, and try it again after a conflict, as `pyramid_retry` does."""
    manager = args[3]
    while True:
        try:
            try_commit(*args)
        except Exception as error:
            is_conflict = manager.get().isRetryableError(error)
            manager.abort()
            if not is_conflict:
                raise
        else:
            return


def try_commit(database, outbox, clients, manager, name, killer):
    """Commit a clip, with a message and a job."""
    manager.begin()
    request = database.make_request(manager)
    database.add(request, name)
    senders = {key: OutboxSender(outbox, key, each, request) for key, each in clients.items()}
    send_on_commit(senders['messages'], 'note', name, manager=manager)
    submit_on_commit(senders['jobs'], 'note', name, manager=manager)
    current = manager.get()
    current.join(Participant(manager, '', tpc_vote=partial(killer.reach, 'before the vote')))
    last = {'tpc_vote': 'after the vote', 'tpc_finish': 'after the finish'}
    current.join(
        Participant(
            manager, '~~', **{key: partial(killer.reach, each) for key, each in last.items()}
        )
    )
    manager.commit()


if __name__ == '__main__':
    main(*sys.argv[1:])
