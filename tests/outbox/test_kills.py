# SPDX-License-Identifier: ZPL-2.1
"""Programs that are killed: what they have committed arrives, and nothing else does."""

import pytest

from outbox_kills import Killed, Services, make_database
from outbox_program import POINTS

KINDS = pytest.mark.parametrize('kind', ['sqlite', 'postgresql', 'zeo'])


def check(outcome):
    """Check that no message was lost, none was sent without a commit, and each job began once."""
    assert outcome.committed
    assert not any(outcome.lost.values()), outcome
    assert not any(outcome.phantom.values()), outcome
    assert not any(outcome.disordered.values()), outcome
    assert not outcome.twice['jobs'], outcome


@KINDS
def test_kills(kind, tmp_path):
    """At each point, and at a random time."""
    with make_database(kind, tmp_path) as url, Services(tmp_path) as services:
        killed = Killed(url, tmp_path, services)
        for point in POINTS:
            killed.kill_at(point)
        killed.kill_at_random()
        check(killed.drain())


@pytest.mark.slow
@pytest.mark.timeout(900)
@KINDS
def test_many_kills(kind, tmp_path):
    """100 times at a random time, and 100 times at a point."""
    with make_database(kind, tmp_path) as url, Services(tmp_path) as services:
        killed = Killed(url, tmp_path, services, seed=17)
        for turn in range(100):
            killed.kill_at_random()
            killed.kill_at(POINTS[turn % len(POINTS)])
        outcome = killed.drain()
    print(kind, outcome.committed, 'committed,', outcome.twice, 'twice')
    check(outcome)


@KINDS
def test_outage(kind, tmp_path):
    check_outage(kind, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@KINDS
def test_long_outage(kind, tmp_path):
    check_outage(kind, tmp_path, 60)


def check_outage(kind, folder, seconds):
    """Check that commits go on while the services are down, and all arrives afterwards."""
    with make_database(kind, folder) as url, Services(folder) as services:
        killed = Killed(url, folder, services)
        killed.run_without_services(seconds)
        outcome = killed.drain()
    print(kind, outcome.committed, 'committed,', outcome.twice, 'twice')
    check(outcome)
