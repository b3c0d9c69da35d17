# SPDX-License-Identifier: ZPL-2.1
"""Jobs of a pool, from the message of a client to the result."""

import time
from datetime import datetime, timedelta, timezone
from threading import Thread

import pytest

from checks import TIMEOUT, wait_until
from handlers import Process
from job_checks import Asker, lines_of
from job_handlers import Jobs
from pyams_zmq.exceptions import ZMQHandlerError, ZMQJournalError
from pyams_zmq.pool import ZMQPool
from pyams_zmq.socket import zmq_socket

MEMBERS = {
    *('id', 'type', 'state', 'attempt', 'failures', 'created', 'due', 'started', 'ended'),
    *('progress', 'eta', 'revision', 'reply'),
}


def test_job(asker):
    before = datetime.now(timezone.utc) - timedelta(milliseconds=1)
    assert asker.ask('add', [1, 2], id='mine') == [202, {'id': 'mine'}]
    job = asker.wait('mine')
    expected = {'id': 'mine', 'type': 'add', 'state': 'done', 'attempt': 1, 'failures': 0}
    assert expected.items() <= job.items()
    assert job.keys() == MEMBERS
    assert job['reply'] == [200, 3]
    assert (job['progress'], job['eta'], job['due']) == (None, None, None)
    texts = [job[name].replace('Z', '+00:00') for name in ('created', 'started', 'ended')]
    times = [datetime.fromisoformat(text) for text in texts]
    assert before <= times[0] <= times[1] <= times[2] <= datetime.now(timezone.utc)
    assert asker.ask('add', [1, 2], id='mine') == [200, {'id': 'mine'}]
    assert asker.job('mine') == job


def test_call_is_a_submit(asker):
    [status, payload] = asker.ask('add', [1])
    assert status == 202
    assert asker.wait(payload['id'])['reply'] == [200, 1]


def test_what_a_method_gets(asker):
    job = asker.run('show', {'a': 1})
    assert job['reply'] == [200, [job['id'], 'show', 1, '127.0.0.1', {'a': 1}]]


def test_frames_of_a_job(asker):
    with zmq_socket(asker.address) as socket:
        socket.send_multipart([b'first', b'["frames", 2, {"id": "x"}]'])
        assert socket.recv_json() == [202, {'id': 'x'}]
    assert asker.wait('x')['reply'] == [200, ['first', 2]]


def test_result_without_status(asker):
    assert asker.run('text', 'ä')['reply'] == 'ä'


def test_deadline_of_a_message_is_not_that_of_its_job(asker):
    job_id = asker.submit('add', [1], deadline=time.time() + 20, delay=0.3)
    job = asker.job(job_id)
    assert job['state'] == 'waiting'
    assert job['due'] > job['created']
    assert asker.wait(job_id)['state'] == 'done'
    assert asker.ask('add', [1], deadline=1)[0] == 504


def test_key(asker, tmp_path):
    path = tmp_path / 'hold'
    path.touch()
    args = {'path': str(path), 'log': str(tmp_path / 'log')}
    first = asker.submit('work', args, key='clip')
    assert asker.ask('work', args, key='clip') == [200, {'id': first}]
    path.unlink()
    asker.wait(first)
    assert asker.submit('work', args, key='clip') != first


def test_id_of_a_submission_with_a_known_key(asker, tmp_path):
    """Somebody who knows only this id, from before a commit, finds the job by it."""
    path = tmp_path / 'hold'
    path.touch()
    args = {'path': str(path), 'log': str(tmp_path / 'log')}
    asker.ask('work', args, id='first', key='clip')
    assert asker.ask('work', args, id='second', key='clip') == [200, {'id': 'first'}]
    job = asker.wait('second', until=lambda job: job['progress'])
    assert (job['id'], job['attempt']) == ('second', 1)
    after = {'second': job['revision'], 'first': 2**60}
    status, job = asker.ask('pyams_zmq.job.wait', {'ids': ['first', 'second'], 'after': after})
    assert (status, job['id']) == (200, 'first')
    assert asker.ask('pyams_zmq.job.cancel', 'second') == [200, None]
    assert [asker.wait(name)['state'] for name in ('first', 'second')] == ['cancelled'] * 2
    assert [job['id'] for job in asker.ask('pyams_zmq.jobs')[1]] == ['first']
    path.unlink()
    assert asker.ask('pyams_zmq.job.retry', 'second') == [200, None]
    assert asker.wait('first')['attempt'] == 2


def test_priority_and_number_at_a_time(job_pool, tmp_path):
    with Asker(job_pool(jobs=1, workers=2)) as asker:
        log = tmp_path / 'log'
        args = {'log': str(log), 'seconds': 0.1}
        ids = [asker.submit('nap', args, priority=number) for number in (0, 1, 5, 3)]
        for job_id in ids:
            asker.wait(job_id)
        lines = [[line[0], line[2]] for line in lines_of(log, 8)]
    assert lines[::2] == [[ids[number], 'begin'] for number in (0, 2, 3, 1)]
    assert lines[1::2] == [[ids[number], 'end'] for number in (0, 2, 3, 1)]


def test_expired_job(job_pool, tmp_path):
    path = tmp_path / 'hold'
    path.touch()
    with Asker(job_pool(jobs=1)) as asker:
        held = asker.submit('work', {'path': str(path), 'log': str(tmp_path / 'log')})
        job = asker.run('add', [1], expires=0.1)
        assert (job['state'], job['attempt'], job['reply']) == ('expired', 0, None)
        path.unlink()
        asker.wait(held)
        assert asker.ask('pyams_zmq.job.retry', job['id']) == [200, None]
        assert asker.wait(job['id'])['reply'] == [200, 1]


def test_calls_beside_jobs(job_pool, tmp_path):
    path = tmp_path / 'hold'
    path.touch()
    with Asker(job_pool(workers=2)) as asker:
        args = {'path': str(path), 'log': str(tmp_path / 'log')}
        ids = [asker.submit('work', args) for _number in range(3)]
        lines_of(tmp_path / 'log')
        assert asker.ask('ping')[0] == 200
        assert min(asker.job(job_id)['state'] for job_id in ids) == 'running'
        path.unlink()
        for job_id in ids:
            asker.wait(job_id)


def test_jobs_beside_busy_workers(job_pool, tmp_path):
    """Calls that always wait do not starve a job."""
    paths = [tmp_path / f'hold{number}' for number in range(3)]
    for path in paths:
        path.touch()
    pool = job_pool(workers=2)
    askers = [Asker(pool) for _path in paths]
    threads = [
        Thread(target=asker.ask, args=('hold', str(path)))
        for asker, path in zip(askers, paths, strict=True)
    ]
    with Asker(pool) as asker:
        for thread in threads:
            thread.start()
        wait_until(lambda: pool.stats()['queue'] == 1, TIMEOUT)
        job_id = asker.submit('add', [1])
        paths[0].unlink()
        assert asker.wait(job_id)['state'] == 'done'
        for path in paths[1:]:
            path.unlink()
    for thread, asker in zip(threads, askers, strict=True):
        thread.join(TIMEOUT)
        asker.__exit__()


def test_failures(asker, tmp_path):
    log = str(tmp_path / 'log')
    job = asker.run('fail', {'log': log, 'until': 3})
    assert (job['state'], job['attempt'], job['failures']) == ('done', 3, 2)
    job = asker.run('fail', {'log': log, 'until': 9})
    assert (job['state'], job['attempt'], job['failures']) == ('failed', 3, 3)
    assert job['reply'][0] == 500
    job = asker.run('fail', {'log': log, 'until': 9}, retries=0)
    assert (job['state'], job['attempt'], job['failures']) == ('failed', 1, 1)
    assert asker.ask('pyams_zmq.job.retry', job['id']) == [200, None]
    job = asker.wait(job['id'])
    assert (job['state'], job['attempt'], job['failures']) == ('failed', 2, 1)


def test_client_error_is_final(asker):
    job = asker.run('refuse', 422)
    assert (job['state'], job['attempt'], job['reply']) == ('failed', 1, [422, 'attempt 1'])
    assert asker.run('refuse', 503, retries=1)['reply'] == [503, 'attempt 2']


def test_time_limit(asker, tmp_path):
    job = asker.run('slow', {'log': str(tmp_path / 'log')})
    assert (job['state'], job['attempt'], job['failures']) == ('done', 2, 1)
    path = tmp_path / 'hold'
    path.touch()
    args = {'path': str(path), 'log': str(tmp_path / 'log2')}
    job = asker.run('work_async', args, timeout=0.1)
    assert job['state'] == 'failed'
    assert job['reply'][0] == 504


def test_large_result(asker):
    job = asker.run('text', 'x' * 1_000_000)
    assert job['state'] == 'done'
    job = asker.run('repeat', 1_100_000)
    assert job['state'] == 'failed'
    assert job['reply'][0] == 413


def test_result_above_the_limit_of_replies(job_pool):
    """It is final as well: another attempt would have it, too."""
    with Asker(job_pool(max_reply_size=100_000)) as asker:
        job = asker.run('repeat', 200_000, retries=3)
    assert (job['state'], job['attempt'], job['reply'][0]) == ('failed', 1, 413)
    assert 'the limit is 100000: store it in a file' in job['reply'][1]


def test_result_with_frames(asker):
    job = asker.run('with_frames')
    assert job['state'] == 'failed'
    assert 'store them in a file' in job['reply'][1]


BAD_OPTIONS = [
    ({'id': ''}, 'id'),
    ({'id': 'a b'}, 'id'),
    ({'id': 'x' * 65}, 'id'),
    ({'id': 1}, 'id'),
    ({'key': ''}, 'key'),
    ({'key': 'ä' * 128}, 'key'),
    ({'delay': -1}, 'delay'),
    ({'delay': '1'}, 'delay'),
    ({'delay': 1e9}, 'delay'),
    ({'expires': True}, 'expires'),
    ({'expires': 0}, 'expires'),
    ({'expires': 5, 'delay': 5}, 'expires'),
    ({'priority': 1.5}, 'priority'),
    ({'priority': 1001}, 'priority'),
    ({'retries': -1}, 'retries'),
    ({'timeout': 0}, 'timeout'),
]


def test_bad_options(asker):
    for options, name in BAD_OPTIONS:
        status, text = asker.ask('add', [1], **options)
        assert status == 400
        assert f'option {name}:' in text


def test_unknown_option(asker):
    assert asker.run('add', [1], colour='red', key=None)['state'] == 'done'


BAD_MESSAGES = [
    ('pyams_zmq.job', 'unknown', 404),
    ('pyams_zmq.job', None, 400),
    ('pyams_zmq.job', ['x'], 400),
    ('pyams_zmq.job.wait', 'x', 400),
    ('pyams_zmq.job.wait', {'id': 'unknown'}, 404),
    ('pyams_zmq.job.wait', {'ids': []}, 400),
    ('pyams_zmq.job.wait', {'ids': ['x'] * 101}, 400),
    ('pyams_zmq.job.wait', {'id': 'x', 'timeout': 'long'}, 400),
    ('pyams_zmq.job.wait', {'id': 'x', 'after': 'a'}, 400),
    ('pyams_zmq.job.wait', {'id': 'x', 'after': dict.fromkeys(map(str, range(101)), 1)}, 400),
    ('pyams_zmq.job.cancel', {'id': 'unknown'}, 404),
    ('pyams_zmq.job.cancel', {'id': 'x', 'force': 1}, 400),
    ('pyams_zmq.job.retry', 'unknown', 404),
    ('pyams_zmq.jobs', 'x', 400),
    ('pyams_zmq.jobs', {'state': 'x'}, 400),
    ('pyams_zmq.jobs', {'type': 1}, 400),
    ('pyams_zmq.jobs', {'limit': 101}, 400),
    ('pyams_zmq.jobs', {'before': 'unknown'}, 404),
    ('pyams_zmq.job.other', None, 404),
    ('pyams_zmq.jobsx', None, 404),
]


def test_bad_messages(asker):
    for name, args, status in BAD_MESSAGES:
        assert asker.ask(name, args)[0] == status, (name, args)


def test_list(asker):
    ids = [asker.submit('add', [number]) for number in range(5)]
    ids.append(asker.submit('text', 1))
    for job_id in ids:
        asker.wait(job_id)
    _status, jobs = asker.ask('pyams_zmq.jobs')
    assert [job['id'] for job in jobs] == ids[::-1]
    assert {job['reply'] for job in jobs} == {None}
    _status, jobs = asker.ask('pyams_zmq.jobs', {'type': 'add', 'limit': 2, 'before': ids[3]})
    assert [job['id'] for job in jobs] == [ids[2], ids[1]]
    assert asker.ask('pyams_zmq.jobs', {'state': 'failed'}) == [200, []]


def test_wait_for_the_first_of_several_jobs(asker, tmp_path):
    path = tmp_path / 'hold'
    path.touch()
    held = asker.submit('work', {'path': str(path), 'log': str(tmp_path / 'log')})
    job = asker.wait(held, until=lambda job: job['progress'])
    later = asker.submit('add', [1], delay=0.2)
    waits = {'ids': [held, later], 'after': {later: asker.job(later)['revision'], held: -1}}
    status, found = asker.ask('pyams_zmq.job.wait', waits)
    assert (status, found['id']) == (200, held)
    path.unlink()
    after = asker.wait(held)['revision']
    while not (found['id'] == later and found['ended']):
        waits = {'ids': [held, later], 'after': after}
        status, found = asker.ask('pyams_zmq.job.wait', waits)
        assert status == 200
        after = found['revision']
    assert job['state'] == 'running'


def test_end_of_a_wait(asker):
    job_id = asker.submit('add', [1], delay=60)
    job = asker.job(job_id)
    args = {'id': job_id, 'after': job['revision'], 'timeout': 0.1}
    assert asker.ask('pyams_zmq.job.wait', args) == [200, job]


def test_statistics(job_pool):
    pool = job_pool()
    with Asker(pool) as asker:
        asker.run('add', [1])
        asker.submit('add', [1], delay=60)
    jobs = pool.stats()['jobs']
    assert (jobs['states']['done'], jobs['states']['waiting']) == (1, 1)
    assert (jobs['in_hand'], jobs['watchers'], jobs['problem']) == (0, 0, '')


def test_jobs_need_a_journal(start):
    with pytest.raises(ZMQHandlerError, match='add is a job.*set workers and journal'):
        start('127.0.0.1:0', Jobs, factory=ZMQPool, workers=1)
    with pytest.raises(ZMQHandlerError, match='add is a job.*set workers and journal'):
        start('127.0.0.1:0', Jobs, factory=Process)


@pytest.mark.parametrize(
    ('name', 'value', 'error'),
    [
        ('jobs', -1, ValueError),
        ('journal_size', -1, ValueError),
        ('keep', 0, ValueError),
        ('keep', 'a week', ValueError),
        ('cancel_grace', -1, ValueError),
        ('journal', 1, TypeError),
        ('journal', '', ValueError),
    ],
)
def test_bad_attribute(job_pool, name, value, error):
    with pytest.raises(error, match=f'Bad {name}'):
        job_pool(**{name: value})


def test_journal_that_has_reached_its_limit(job_pool):
    pool = job_pool(journal_size=1)
    with Asker(pool) as asker:
        status, text = asker.ask('add', [1, 2])
        assert status == 507
        assert 'the limit is 1: raise journal_size, or lower keep' in text
        assert asker.ask('ping')[0] == 200
        assert 'journal_size' in pool.stats()['jobs']['problem']


def test_journal_that_cannot_be_used(job_pool, tmp_path):
    with pytest.raises(ZMQJournalError, match='nowhere'):
        job_pool(journal=tmp_path / 'nowhere' / 'x.jobs')
