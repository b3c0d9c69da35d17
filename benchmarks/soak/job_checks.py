# SPDX-License-Identifier: ZPL-2.1
"""What must hold after a soak of jobs; each check returns the problems as texts.

The token of a run is ``ID/ATTEMPT``.
"""

from collections import Counter
from itertools import islice

MAX_REPEATED = 0.05
"""Part of the jobs that may begin more than once"""

MIN_REPEATED = 10
"""Number of them that is not too much in a short soak"""

MAX_DEATHS = 3
"""Workers that die during a job before it ends as failed"""

DIED = 502
"""Status of a job whose worker has died"""

SLACK = 0.1
"""Seconds from the time of a record in the journal until it is on disk, at most"""


def count_begins(runs):
    """Return how often each job has begun."""
    return Counter(run.token.rpartition('/')[0] for run in runs)


def find_given_up(jobs, runs):
    """Return the ids of the jobs that have failed because each of three workers was killed."""
    begins = count_begins(runs)
    return {
        job.id
        for job in jobs.values()
        if job.state == 'failed' and job.reply[0] == DIED and begins[job.id] >= MAX_DEATHS
    }


def check_lost(accepted, jobs, runs):
    """Check that each accepted job is done, with its own result, and was run, or was given up.

    :param accepted: ids of the jobs that a client knows to be accepted
    :param jobs: `JobInfo` by id, as they are at the end
    :param runs: `checks.Run` of the workers
    """
    begins = count_begins(runs)
    given_up = find_given_up(jobs, runs)
    for job_id in accepted:
        job = jobs.get(job_id)
        if job is None:
            yield f'{job_id} was accepted, and is unknown'
        elif job_id in given_up:
            continue
        elif job.state != 'done':
            yield f'{job_id} is {job.state} after {job.attempt} attempts: {job.reply}'
        elif job.reply != [200, job_id]:
            yield f'{job_id} has the result {job.reply}'
        elif not begins[job_id]:
            yield f'{job_id} is done, and has not begun'


def check_begun_again(ended, jobs, runs):
    """Check that no job has begun after its success was recorded.

    :param ended: when a client has seen the ends, by id
    """
    for run in runs:
        job_id, _, attempt = run.token.rpartition('/')
        job = jobs.get(job_id)
        if job is None or job.ended is None:
            continue
        if int(attempt) > job.attempt:
            yield f'{job_id}: attempt {attempt} has begun, the last one is {job.attempt}'
        late = run.time - min(ended.get(job_id, run.time), job.ended.timestamp() + SLACK)
        if late > 0:
            yield f'{job_id}: attempt {attempt} has begun {late:.3f} s after its end'


def check_repeated(number, runs):
    """Check that few jobs have begun more than once.

    :param number: number of the jobs
    """
    repeated = {job_id: times for job_id, times in count_begins(runs).items() if times > 1}
    if len(repeated) > max(MIN_REPEATED, MAX_REPEATED * number):
        some = ', '.join(f'{job_id} {times}' for job_id, times in islice(repeated.items(), 5))
        yield f'{len(repeated)} jobs have begun more than once: {some}'
