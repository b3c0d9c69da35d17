# SPDX-License-Identifier: ZPL-2.1
"""A program that commits clips with a message and a job each, until a signal or a point kills it.

Arguments: URL of the database, addresses of the services for messages and for jobs (empty for
none), name of the process, and the point at which it kills itself, with the number of the time;
empty for none.
"""

import os
import signal
import sys
from collections import Counter
from functools import wraps

import transaction

from outbox_databases import APPLICATION, open_database
from pyams_zmq.client import ZMQClient
from pyams_zmq.outbox import relay
from pyams_zmq.client.transaction import send_on_commit, submit_on_commit
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.sender import OutboxSender

CHECK_INTERVAL = 0.3
"""Seconds, so that the programs of a test adopt the messages of those before them"""

POINTS = ('before the vote', 'after the vote', 'after the finish', 'after the post', 'after the drop')


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

    def sortKey(self):
        return self._key

    def tpc_begin(self, transaction):
        """Do nothing."""

    abort = commit = tpc_vote = tpc_finish = tpc_abort = tpc_begin


def main(url, messages, jobs, process, point, number):
    killer = Killer(point, int(number or 0))
    relay.CHECK_INTERVAL = CHECK_INTERVAL
    relay.Relay.post = killer.after('after the post', relay.Relay.post)
    clients = {name: ZMQClient(address) for name, address in (('messages', messages), ('jobs', jobs)) if address}
    manager = transaction.TransactionManager()
    with open_database(url, process) as database:
        storage = database.storage
        storage.settle = killer.after('after the drop', storage.settle)
        outbox = Outbox(storage, clients.__getitem__, APPLICATION)
        outbox.start()
        counts = Counter()
        while True:
            name = f'{process}.{counts["committed"]}'
            manager.begin()
            request = database.make_request(manager)
            database.add(request, name)
            for service, client in clients.items():
                sender = OutboxSender(outbox, service, client, request)
                if service == 'messages':
                    send_on_commit(sender, 'note', name, manager=manager)
                else:
                    submit_on_commit(sender, 'note', name, manager=manager)
            current = manager.get()
            reach = killer.reach
            current.join(Participant(manager, '', tpc_vote=lambda: reach('before the vote')))
            current.join(
                Participant(
                    manager,
                    '~~',
                    tpc_vote=lambda: reach('after the vote'),
                    tpc_finish=lambda: reach('after the finish'),
                )
            )
            manager.commit()
            counts['committed'] += 1
            if counts['committed'] == 1:
                print('up', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
