# SPDX-License-Identifier: ZPL-2.1
"""Declaring jobs, and what a method can do with its job."""

import asyncio

import pytest

from pyams_zmq.exceptions import ZMQHandlerError, ZMQMessageError
from pyams_zmq.handler.job import JobPolicy, RunningJob
from pyams_zmq.handler.methods import methods_of, zmq_method
from pyams_zmq.handler.plain import check_handler
from pyams_zmq.jobs import Job, JobCancelled, zmq_job


class Handler:
    timeout = 5

    @zmq_job()
    def first(self, args):
        """Have the defaults."""

    @zmq_job
    def bare(self, args):
        """Have them, too."""

    @zmq_job(retries=3, backoff=5, timeout=60)
    async def second(self, args, *, job, peer):
        """Have other values."""

    def call(self, args, *, job='usual'):
        """Take an argument that has the name of the parameter of jobs."""
        return job


def test_declaration():
    methods = methods_of(Handler())
    first, second, call = (methods[name] for name in ('first', 'second', 'call'))
    assert (first.job, first.timeout, first.wants_job) == (JobPolicy(0, 1.0), None, False)
    assert methods['bare'].job == first.job
    assert (second.job, second.timeout, second.wants_job) == (JobPolicy(3, 5.0), 60, True)
    assert (call.job, call.timeout, call.wants_job) == (None, 5, False)


def test_options_by_position():
    with pytest.raises(
        TypeError, match=r'Bad method 3: write @zmq_job, or .*@zmq_job\(retries=3\)'
    ):
        zmq_job(3)


@pytest.mark.parametrize(
    'options',
    [
        {'retries': -1},
        {'retries': 1.5},
        {'retries': True},
        {'retries': 1001},
        {'backoff': 0},
        {'backoff': '1'},
        {'backoff': float('inf')},
        {'backoff': float('nan')},
        {'backoff': 3601},
        {'timeout': 0},
        {'timeout': 'long'},
    ],
)
def test_bad_declaration(options):
    [name] = options
    with pytest.raises(ValueError, match=f'Bad {name}'):
        zmq_job(**options)


class WithoutStar:
    @zmq_job
    def convert(self, args, job):
        """Get no job."""


class OnlyJob:
    @zmq_job
    def convert(self, job):
        """Get the arguments as the job."""


class WithLimit:
    @zmq_job
    @zmq_method(timeout=5)
    def convert(self, args):
        """Have a limit for calls."""


class Repeatable:
    @zmq_method(repeatable=False)
    @zmq_job
    def convert(self, args):
        """Run again, whatever it says."""


@pytest.mark.parametrize(
    ('handler', 'text'),
    [
        (WithoutStar, r'The parameter job of WithoutStar\.convert would not .* behind `\*`'),
        (OnlyJob, r'The parameter job of OnlyJob\.convert would not get the job'),
        (WithLimit, r'WithLimit\.convert is a job: timeout .* zmq_job\(timeout=\.\.\.\)'),
        (Repeatable, r'Repeatable\.convert is a job: timeout and repeatable of zmq_method'),
    ],
)
def test_declaration_without_effect(handler, text):
    with pytest.raises(ZMQHandlerError, match=text):
        check_handler(handler)


def test_spread_job():
    class Spread:
        @zmq_job
        @zmq_method(spread=True)
        def convert(self, path, *, job):
            """Get its only argument by name."""

    [method] = methods_of(Spread()).values()
    assert method.wants_job
    assert method.arguments.bind({'path': 'x'}).args == ('x',)


def test_call_with_a_parameter_job(caplog):
    class Forgotten:
        def convert(self, args, *, job):
            """Get it from the message."""

    assert list(methods_of(Forgotten())) == ['convert']
    [record] = caplog.records
    assert 'Forgotten.convert is not a job' in record.getMessage()


def test_check_of_a_handler_with_jobs():
    check_handler(Handler)
    with pytest.raises(ValueError, match=r'Handler\.first is a job .*set workers and journal'):
        check_handler(Handler, takes_jobs=False)


def test_job():
    job = RunningJob('mine', 'convert', 2)
    assert isinstance(job, Job)
    assert repr(job) == "RunningJob('convert', id='mine', attempt=2)"
    assert job.published is None
    job.progress(1, 10, 'x' * 300)
    assert job.published == (1, 10, 'x' * 200)
    job.progress(2.5)
    assert job.published == (2.5, None, '')
    for bad in (('1',), (True,), (1, '2')):
        with pytest.raises(TypeError, match='Bad progress'):
            job.progress(*bad)
    for bad in (float('nan'), float('inf'), 10**400):
        with pytest.raises(ValueError, match='Bad progress'):
            job.progress(bad)
    job.progress(2.5, None, '\udc80')
    assert job.published == (2.5, None, '?')
    assert not job.is_cancelled
    job.cancel()
    assert job.is_cancelled
    with pytest.raises(JobCancelled) as caught:
        job.progress(3)
    assert isinstance(caught.value, ZMQMessageError)
    assert caught.value.status == 410
    assert job.published == (2.5, None, '?')


@pytest.mark.parametrize('make', [asyncio.sleep, lambda seconds: asyncio.Future()])
def test_job_that_is_cancelled_before_it_begins(make):
    async def call():
        job = RunningJob('mine', 'convert')
        job.cancel()
        await job.wait(make(60))

    with pytest.raises(JobCancelled):
        asyncio.run(call())


def test_job_whose_task_is_cancelled_otherwise():
    async def call():
        job = RunningJob('mine', 'convert')
        task = asyncio.ensure_future(job.wait(asyncio.sleep(60)))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call())
