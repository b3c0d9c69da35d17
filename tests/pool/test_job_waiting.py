# SPDX-License-Identifier: ZPL-2.1
"""Jobs wait on disk: the broker has those in hand that run, and one more."""

from job_checks import Asker, lines_of

COUNT = 300


def test_waiting_jobs_are_not_in_memory(job_pool, tmp_path):
    path, log = tmp_path / 'hold', tmp_path / 'log'
    path.touch()
    pool = job_pool(jobs=1)
    with Asker(pool) as asker:
        first = asker.submit('work', {'path': str(path), 'log': str(log)})
        lines_of(log)
        jobs = [asker.submit('add', [number]) for number in range(COUNT)]
        stats = pool.stats()['jobs']
        assert stats['states']['waiting'] == COUNT
        assert stats['in_hand'] == stats['states']['running'] == 1
        path.unlink()
        asker.wait(first)
        assert asker.wait(jobs[-1])['reply'] == [200, COUNT - 1]
        assert pool.stats()['jobs']['in_hand'] <= 1
