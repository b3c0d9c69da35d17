# SPDX-License-Identifier: ZPL-2.1
"""Helpers of the tests of messages that are sent on commit."""

import os
import re

import transaction

from checks import wait_until


class Journal:
    """A data manager that records the names of its calls."""

    transaction_manager = transaction.manager

    def __init__(self, key='journal', **hooks):
        self.key = key
        self.lines = []
        self.hooks = hooks

    def sortKey(self):  # noqa: N802 - the name of IDataManager
        return self.key

    def __getattr__(self, name):
        if name not in ('abort', 'tpc_begin', 'commit', 'tpc_vote', 'tpc_finish', 'tpc_abort'):
            raise AttributeError(name)

        def write(txn):
            self.lines.append(name)
            self.hooks.get(name, lambda: None)()

        return write


def without_ids(texts):
    """Return texts of the log without the ids of messages, which must be there."""
    pattern = rf' \(ids? {os.getpid()}\.\d+[-,.\d ]*\)'
    assert all(re.search(pattern, text) for text in texts)
    return [re.sub(pattern, '', text) for text in texts]


def notes(client):
    """Return what the handler has recorded, after all messages of the client have a reply."""
    wait_until(lambda: not len(client._queue.get()))
    return client.call('all_notes')
