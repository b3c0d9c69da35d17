# SPDX-License-Identifier: ZPL-2.1
"""How many requests are retried because of conflicts, with and without an outbox."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from pyramid_retry import IBeforeRetry

THREADS = 8

COMMITS = 75
"""Number of commits of a thread"""

ALLOWANCE = 2 * THREADS
"""For the first messages of a process, which conflict with each other in a ZODB"""


class Retries(list):
    """Keeps the errors for which requests are retried; a list is changed by many threads."""

    def note(self, event):
        self.append(event.exception)


def commit_all(application, to, thread):
    """Raise the counter of a thread, and send a message with each commit."""
    for number in range(COMMITS):
        message = f'{thread}.{number}'
        response = application.get('/count', name=thread, to=to, message=message)
        assert response.status_int == 200


def run(application, to):
    """Let threads commit; return the errors that are retried."""
    retries = Retries()
    application.registry.registerHandler(retries.note, (IBeforeRetry,))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(partial(commit_all, application, to), range(THREADS)))
    application.registry.unregisterHandler(retries.note, (IBeforeRetry,))
    return retries


@pytest.mark.parametrize('database', ['file', 'zeo', 'postgresql'], indirect=True)
def test_conflicts(make_application, services):
    services.start('converter')
    application = make_application(**{'retry.attempts': '100'})
    application.database.make_counters(application.registry, map(str, range(THREADS)))
    without = run(application, '')
    retries = run(application, 'converter')
    application.wait_until_empty()
    print(f'{THREADS * COMMITS} commits: {len(without)} retries without, {len(retries)} with')
    print(Counter(map(repr, retries)))
    expected = {f'{thread}.{number}' for thread in range(THREADS) for number in range(COMMITS)}
    assert set(services.names()) == expected
    counters = application.database.read_counters(application.registry)
    assert set(counters.values()) == {2 * COMMITS}
    assert len(retries) <= 1.1 * len(without) + ALLOWANCE
