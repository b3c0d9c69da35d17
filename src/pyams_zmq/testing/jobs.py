# SPDX-License-Identifier: ZPL-2.1
"""Jobs that are recorded instead of sent, and run in the process of the test."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from pyams_zmq.client.job_info import JobProgress
from pyams_zmq.handler.job import RunningJob
from pyams_zmq.wire.clock import time
from pyams_zmq.wire.message import decode_reply, status_of
from pyams_zmq.wire.uuid7 import make_uuid7

JobRunner = Callable[[RunningJob], bytes]
"""Function that runs a job and returns its encoded reply"""

_Status = list[Any]  # a reply, [status, payload]

_SERVER_ERROR = 500


class RecordedJob:
    """A job that was submitted to a :class:`RecordingClient`.

    :ivar name: name of the client
    :ivar id: id of the job
    :ivar aliases: list of the ids of later submissions with its key, which are other names of it
    :ivar type: type of its message
    :ivar args: its arguments, as the service would receive them
    :ivar frames: list of its binary frames
    :ivar options: `key`, `delay` and the others that were given
    :ivar state: `waiting` until it has run, then `done`, `failed` or `cancelled`
    :ivar attempt: number of times that it has run
    :ivar failures: number of these that have failed, since it was submitted or retried
    :ivar progress: list of the :class:`~pyams_zmq.client.jobs.JobProgress` that it has published
    :ivar reply: its reply, or None
    """

    def __init__(
        self,
        sent: Any,
        options: Mapping[str, Any],
        recorder: 'JobRecorder',
        runner: JobRunner | None,
        retries: int,
    ):
        self.name, self.type, self.args = sent
        self.frames: Sequence[bytes] = sent.frames
        self.options = dict(options)
        self.id: str = self.options.pop('id', None) or make_uuid7()
        self.state = 'waiting'
        self.aliases: list[str] = []
        self.attempt = 0
        self.failures = 0
        self.progress: list[JobProgress] = []
        self.reply: Any = None
        self.revision = 0
        self._times: dict[str, float] = {'created': time()}
        if 'delay' in self.options:
            self._times['due'] = self._times['created'] + self.options['delay']
        self._recorder = recorder
        self._runner = runner
        self._retries: int = self.options.get('retries', retries)
        self._running: RunningJob | None = None

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(name={self.name!r}, type={self.type!r}, args={self.args!r}, '
            f'state={self.state!r})'
        )

    @property
    def is_ended(self) -> bool:
        """True if it has run, or was cancelled."""
        return 'ended' in self._times

    def run(self) -> None:
        """Run the job now, whatever its delay, if it has a handler or a reply.

        After a failure it is tried again as in a service, but without waiting.
        """
        if self._runner is None:
            return
        self.failures = 0
        state = 'waiting'
        while state == 'waiting':
            self.attempt += 1
            self._change('running', started=time())
            running = self._running = _EagerJob(self)
            try:
                reply = decode_reply(self._runner(running))
            finally:
                self._running = None
            state = self._judge(status_of(reply), running.is_cancelled)
        self.reply = None if state == 'cancelled' else reply
        self._change(state, ended=time())

    def _judge(self, status: int | None, is_cancelled: bool) -> str:
        """Return the state after an attempt."""
        if status is None or status // 100 == 2:  # noqa: PLR2004 - as in HTTP
            return 'done'
        if is_cancelled:
            return 'cancelled'
        if status >= _SERVER_ERROR:
            self.failures += 1
            if self.failures <= self._retries:
                return 'waiting'
        return 'failed'

    def cancel(self) -> None:
        """Cancel the job; if it runs, its next progress raises JobCancelled."""
        if self._running is not None:
            self._running.cancel()
        else:
            self._change('cancelled', ended=time())

    def retry(self) -> None:
        """Let a job that has ended run again."""
        del self._times['ended']
        self.reply = None
        self._change('waiting')
        self.run()

    def _publish(self, progress: JobProgress) -> None:
        """Record a progress, and call `on_progress` of the recorder."""
        self.progress.append(progress)
        self.revision += 1
        if self._recorder.on_progress is not None:
            self._recorder.on_progress(self)

    def _change(self, state: str, **times: float) -> None:
        self.state = state
        self._times.update(times)
        self.revision += 1

    def _has_id(self, job_id: str) -> bool:
        return job_id == self.id or job_id in self.aliases

    def _describe(self, job_id: str) -> dict[str, Any]:
        """Return the job as a service describes it to a client that asks for it by an id."""
        progress = self.progress[-1] if self.progress and self.state == 'running' else None
        times = {
            name: datetime.fromtimestamp(seconds, timezone.utc)
            for name, seconds in self._times.items()
        }
        return {
            'id': job_id,
            'type': self.type,
            'state': self.state,
            'attempt': self.attempt,
            'failures': self.failures,
            **times,
            'progress': progress,
            'revision': self.revision,
            'reply': self.reply,
        }


class _EagerJob(RunningJob):
    """The `job` of a method: it records the progress."""

    def __init__(self, recorded: RecordedJob):
        timeout = recorded.options.get('timeout')
        super().__init__(recorded.id, recorded.type, recorded.attempt, timeout)
        self._recorded = recorded

    def progress(self, done: float, total: float | None = None, text: str = '') -> None:
        super().progress(done, total, text)
        self._recorded._publish(JobProgress(done, total, text))


class JobRecorder:
    """The jobs of one or more clients, and the replies of their service.

    :ivar jobs: list of :class:`RecordedJob`, in order
    :ivar on_progress: function that is called with the job after each progress; it may cancel it
    """

    def __init__(self) -> None:
        self.jobs: list[RecordedJob] = []
        self.on_progress: Callable[[RecordedJob], object] | None = None

    def reset(self) -> None:
        """Forget the jobs, and the function."""
        self.jobs.clear()
        self.on_progress = None

    def submit(
        self, sent: Any, options: Mapping[str, Any], runner: JobRunner | None, retries: int = 0
    ) -> _Status:
        """Record a job, run it if it has no delay, and return the reply of the service.

        :param sent: the :class:`Sent` message
        :param runner: runs it, or None if nothing does
        :param retries: attempts after a failure, if the options do not say it
        """
        job_id, key = options.get('id'), options.get('key')
        jobs = [job for job in self.jobs if job.name == sent.name]
        for job in jobs:
            if job_id is not None and job._has_id(job_id):
                return [200, {'id': job.id}]
        for job in jobs:
            is_same = (job.type, job.options.get('key')) == (sent.type, key)
            if is_same and key is not None and not job.is_ended:
                if job_id is not None:
                    job.aliases.append(job_id)
                return [200, {'id': job.id}]
        job = RecordedJob(sent, options, self, runner, retries)
        self.jobs.append(job)
        if not options.get('delay'):
            try:
                job.run()
            except BaseException:  # an exception of the replies: the service has not accepted it
                self.jobs.remove(job)
                raise
        return [202, {'id': job.id}]

    def answer(self, name: str, type: str, args: Any) -> _Status | None:  # noqa: A002
        """Return the reply of a service to a message about jobs, None for other messages."""
        jobs = [job for job in self.jobs if job.name == name]
        if type == 'pyams_zmq.jobs':
            return _list(jobs, **(args or {}))
        if type != 'pyams_zmq.job.wait' and type not in _QUESTIONS:
            return None
        options = args if isinstance(args, dict) else {'id': args}
        ids = options.get('ids') or [options.get('id')]
        found = {job_id: job for job_id in ids for job in jobs if job._has_id(job_id)}
        if len(found) < len(ids):
            return [404, 'There is no job with this id']
        if type == 'pyams_zmq.job.wait':
            return _wait(found, options)
        return _QUESTIONS[type](*found.popitem())


def _wait(jobs: dict[str, RecordedJob], options: dict[str, Any]) -> _Status:
    after = options.get('after')
    known = after if isinstance(after, dict) else {options.get('id'): after}
    for job_id, job in jobs.items():
        if job.revision != known.get(job_id):
            return [200, job._describe(job_id)]
    names = ', '.join(jobs)
    return [409, f'Job {names} does not go on by itself in a test: use eager, replies or its `run`']


def _cancel(_job_id: str, job: RecordedJob) -> _Status:
    if job.is_ended:
        return [409, f'The job has ended, it is {job.state}']
    job.cancel()
    return [200, None]


def _retry(_job_id: str, job: RecordedJob) -> _Status:
    if not job.is_ended or job.state == 'done':
        return [409, f'The job is {job.state}: only a job without success is retried']
    job.retry()
    return [200, None]


_QUESTIONS: dict[str, Callable[[str, RecordedJob], _Status]] = {
    'pyams_zmq.job': lambda job_id, job: [200, job._describe(job_id)],
    'pyams_zmq.job.cancel': _cancel,
    'pyams_zmq.job.retry': _retry,
}


def _list(
    jobs: list[RecordedJob],
    state: str | None = None,
    type: str | None = None,  # noqa: A002 - the name of the field
    limit: int = 100,
    before: str | None = None,
) -> _Status:
    if before is not None:
        ids = [job.id for job in jobs]
        if before not in ids:
            return [404, 'There is no job with the id in "before"']
        jobs = jobs[: ids.index(before)]
    found = [
        job for job in reversed(jobs) if state in (None, job.state) and type in (None, job.type)
    ]
    return [200, [{**job._describe(job.id), 'reply': None} for job in found[:limit]]]
