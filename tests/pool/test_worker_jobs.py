# SPDX-License-Identifier: ZPL-2.1
"""What a worker knows of its jobs."""

import asyncio
import os
import signal
from types import SimpleNamespace

from pyams_zmq.pool import worker_jobs as module
from pyams_zmq.pool.heartbeat import LATE, SuspensionCheck
from pyams_zmq.pool.protocol import JobHeader, make_job_header, make_job_key, parse_job_header
from pyams_zmq.pool.worker_jobs import WorkerJobs
from pyams_zmq.pool.worker_stream import WorkerStream

KEY = make_job_key(1, 1)
OTHER = make_job_key(2, 1)
THIRD = make_job_key(3, 1)


def test_header():
    header = JobHeader('mine', 'convert', 70_000, 2.5)
    sender = b'alice\0' + b'127.0.0.1'
    assert parse_job_header(make_job_header(KEY, header, sender)) == (header, sender)


def test_progress_is_sent_once():
    jobs = WorkerJobs()
    job = jobs.begin(KEY, JobHeader('mine', 'convert', 1))
    assert list(jobs.take_progress()) == []
    job.progress(1, 2, 'x')
    assert list(jobs.take_progress()) == [(KEY, b'[1,2,"x"]')]
    assert list(jobs.take_progress()) == []
    jobs.repeat_progress()
    assert list(jobs.take_progress()) == [(KEY, b'[1,2,"x"]')]
    job.progress(1, 2, 'x')
    assert list(jobs.take_progress()) == [(KEY, b'[1,2,"x"]')]
    jobs.end(KEY, [b'1'])
    assert list(jobs.take_progress()) == []
    assert job.is_cancelled  # its thread may still run


def test_cancel(monkeypatch):
    kills = []
    monkeypatch.setattr(module.os, 'kill', lambda *args: kills.append(args))
    program = SimpleNamespace(send=lambda num: kills.append(('program', num)))
    monkeypatch.setattr(module, 'descendants', lambda: [program])
    jobs = WorkerJobs()
    job = jobs.begin(KEY, JobHeader('mine', 'convert', 1))
    jobs.cancel(OTHER, force=True)
    assert not job.is_cancelled
    jobs.cancel(KEY, force=False)
    assert job.is_cancelled
    assert kills == []
    jobs.cancel(KEY, force=True)
    assert kills == [('program', signal.SIGKILL), (os.getpid(), signal.SIGKILL)]


def test_stop():
    jobs = WorkerJobs()
    job = jobs.begin(KEY, JobHeader('mine', 'convert', 1))
    jobs.stop()
    assert job.is_cancelled


def test_reply_after_a_stop():
    """An error may come from the stop; the broker would take it as the end of the job."""
    jobs = WorkerJobs()
    for key in KEY, OTHER:
        jobs.begin(key, JobHeader('mine', 'convert', 1))
    jobs.stop()
    jobs.begin(THIRD, JobHeader('mine', 'convert', 1))
    process = SimpleNamespace(jobs=jobs, count_reply=lambda: None, is_connected=False)
    stream = SimpleNamespace(process=process, pending={KEY, OTHER, THIRD}, max_size=100)
    WorkerStream._route_reply(stream, [KEY], b'[410,"cancelled"]')
    WorkerStream._route_reply(stream, [KEY], [b'[410,"cancelled"]'])
    WorkerStream._route_reply(stream, [OTHER], b'[200,1]')
    WorkerStream._route_reply(stream, [THIRD], b'[410,"gone"]')
    assert jobs.replies == {OTHER: [b'[200,1]'], THIRD: [b'[410,"gone"]']}
    assert stream.pending == {KEY}  # until the end of the process


def test_replies_are_kept_until_they_are_acknowledged():
    async def wait():
        jobs = WorkerJobs()
        await jobs.wait_for_acks()
        jobs.end(KEY, [b'1'])
        jobs.end(OTHER, [b'2'])
        jobs.acknowledge(OTHER)
        task = asyncio.ensure_future(jobs.wait_for_acks())
        await asyncio.sleep(0)
        assert not task.done()
        jobs.acknowledge(KEY)
        jobs.acknowledge(KEY)
        await task
        assert jobs.replies == {}

    asyncio.run(wait())


def test_what_comes_in_after_a_suspension():
    """It may have been sent before, until the broker knows the worker again."""
    check = SuspensionCheck(limit=1.0)
    assert not check.is_late(5.0)
    check.turn(10.0)
    assert not check.is_late(11.0)
    assert check.is_late(11.1)
    check.turn(11.0)
    assert not check.is_late(11.1)
    check.turn(20.0)
    assert check.is_late(20.0 + LATE / 2)
    assert not check.is_late(20.0 + LATE)
    check.reset()
    assert not check.is_late(20.0)
