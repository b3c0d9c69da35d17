# SPDX-License-Identifier: ZPL-2.1
"""Clients remove jobs that have ended."""

from ipaddress import ip_address

from job_checks import Asker
from pyams_zmq.jobs.writer import JournalWriter
from pyams_zmq.process import inspection as inspection_module

PRUNE = ('pyams_zmq.jobs.prune', {'older_than': 0})


def test_prune(job_pool):
    pool = job_pool()
    with Asker(pool) as asker:
        jobs = [asker.run('add', [number]) for number in range(3)]
        waiting = asker.submit('text', 'x', delay=60)
        assert asker.ask('pyams_zmq.jobs.prune', {'older_than': 3600}) == [
            200,
            {'removed': 0, 'has_more': False},
        ]
        assert pool.stats()['jobs']['types'] == {'add': {'done': 3}, 'text': {'waiting': 1}}
        assert asker.ask(*PRUNE) == [200, {'removed': 3, 'has_more': False}]
        assert asker.ask('pyams_zmq.job', jobs[0]['id'])[0] == 404
        assert asker.job(waiting)['state'] == 'waiting'
        assert pool.stats()['jobs']['types'] == {'text': {'waiting': 1}}


def test_bad_arguments(asker):
    assert asker.ask('pyams_zmq.jobs.prune', {'older_than': 'week'}) == [
        400,
        'Bad option older_than: write a number from 0 to 3.16224e+08',
    ]


def test_right(job_pool, monkeypatch):
    """It is that of the list of all jobs."""
    monkeypatch.setattr(inspection_module, 'parse_ip', lambda address: ip_address('192.0.2.1'))
    pool = job_pool(auth=['alice:a', 'carol:c'], stats_users={'carol'})
    with Asker(pool, auth='alice:a') as alice, Asker(pool, auth='carol:c') as carol:
        alice.run('add', [1])
        assert alice.ask(*PRUNE)[0] == 403
        assert carol.ask(*PRUNE)[1]['removed'] == 1


def test_journal_that_cannot_be_written(job_pool, tmp_path, monkeypatch):
    full = tmp_path / 'full'

    def reach(_writer, step):
        if step == 'begun' and full.exists():
            raise OSError('no space')

    monkeypatch.setattr(JournalWriter, '_reach', reach)
    with Asker(job_pool()) as asker:
        asker.run('add', [1])
        full.touch()
        assert asker.ask(*PRUNE)[0] == 507
        full.unlink()
        assert asker.ask(*PRUNE)[1]['removed'] == 1
