# SPDX-License-Identifier: ZPL-2.1
"""Jobs that are recorded instead of sent, and run in the process of the test."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from msgspec.structs import asdict

from pyams_zmq.client.job_info import JobProgress
from pyams_zmq.exceptions import ZMQJobError, ZMQMessageError
from pyams_zmq.handler.job import JobPolicy, RunningJob
from pyams_zmq.jobs.job_messages import Cancel, Wait, describe_job, read_id, read_options, read_page
from pyams_zmq.jobs.job_replies import UNKNOWN, UNKNOWN_BEFORE, refuse_result
from pyams_zmq.jobs.job_table import MAX_REPLY_SIZE
from pyams_zmq.pool.job_verdict import Verdict, judge_reply
from pyams_zmq.wire.clock import time
from pyams_zmq.wire.message import decode_reply, encode
from pyams_zmq.wire.uuid7 import make_uuid7

JobRunner = Callable[[RunningJob], list[bytes]]
"""Function that runs a job and returns the frames of its reply"""

_Status = list[Any]  # a reply, [status, payload]
_DEFAULT_POLICY = JobPolicy()


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
        policy: JobPolicy,
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
        self._policy = policy
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
        """Run the job now, without its delay, if it has a handler or a reply.

        After a failure it is tried again as in a service, but without waiting.

        :raises ZMQJobError: with status 409, if it runs or has ended
        """
        if self.state != 'waiting':
            raise ZMQJobError(409, f'The job is {self.state}: only a job that waits is run')
        if self._runner is None:
            return
        self.failures = 0
        verdict = None
        while verdict is None or verdict.state is None:
            self.attempt += 1
            self._change('running', started=time())
            running = self._running = _EagerJob(self)
            try:
                frames = self._runner(running)
            except BaseException:
                self._change('waiting')
                raise
            finally:
                self._running = None
            verdict = self._judge(frames, running.is_cancelled)
            self.failures = verdict.counts.get('failures', self.failures)
        self.reply = None if verdict.reply is None else decode_reply(verdict.reply)
        self._change(verdict.state, ended=time())

    def _judge(self, frames: list[bytes], is_cancelled: bool) -> Verdict:
        """Return what becomes of the job after an attempt, as a service decides it."""
        run: Any = SimpleNamespace(
            record=SimpleNamespace(retries=self.options.get('retries'), failures=self.failures),
            is_cancelled=is_cancelled,
        )
        verdict = judge_reply(run, frames, self._policy)
        size = len(verdict.reply or b'')
        if size > MAX_REPLY_SIZE:
            return verdict._replace(state='failed', reply=refuse_result(size, MAX_REPLY_SIZE))
        return verdict

    def cancel(self) -> None:
        """Cancel the job; if it runs, its next progress raises JobCancelled.

        :raises ZMQJobError: with status 409, if it has ended
        """
        if self.is_ended:
            raise ZMQJobError(409, f'The job has ended, it is {self.state}')
        if self._running is not None:
            self._running.cancel()
        else:
            self._change('cancelled', ended=time())

    def retry(self) -> None:
        """Let a job that has ended without success run again.

        :raises ZMQJobError: with status 409, if it has not ended, was successful, or another one
            with its key has not ended
        """
        if not self.is_ended or self.state == 'done':
            text = f'The job is {self.state}: only a job without success is retried'
            raise ZMQJobError(409, text)
        if self._recorder.find_unfinished(self.name, self.type, self.options.get('key')):
            raise ZMQJobError(409, 'Another job with its key has not ended')
        for name in ('due', 'ended'):
            self._times.pop(name, None)
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
        live = None
        if self.progress and self.state == 'running':
            live = SimpleNamespace(progress=asdict(self.progress[-1]), revision=self.revision)
        record: Any = SimpleNamespace(
            id=job_id,
            type=self.type,
            state=self.state,
            attempt=self.attempt,
            failures=self.failures,
            **{name: self._times.get(name) for name in ('created', 'due', 'started', 'ended')},
            revision=self.revision,
            reply=None if self.reply is None else encode(self.reply),
        )
        return describe_job(record, time(), live)


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
        self,
        sent: Any,
        options: Mapping[str, Any],
        runner: JobRunner | None,
        policy: JobPolicy = _DEFAULT_POLICY,
    ) -> _Status:
        """Record a job, run it if it has no delay, and return the reply of the service.

        :param sent: the :class:`Sent` message
        :param runner: runs it, or None if nothing does
        :param policy: how often it is tried, if the options do not say it
        """
        try:
            options = read_options(options)
        except ZMQMessageError as error:
            return [error.status, error.text]
        job_id = options.get('id')
        for job in self._jobs_of(sent.name):
            if job_id is not None and job._has_id(job_id):
                return [200, {'id': job.id}]
        known = self.find_unfinished(sent.name, sent.type, options.get('key'))
        if known is not None:
            if job_id is not None:
                known.aliases.append(job_id)
            return [200, {'id': known.id}]
        job = RecordedJob(sent, options, self, runner, policy)
        self.jobs.append(job)
        if not options.get('delay'):
            try:
                job.run()
            except BaseException:  # an exception of the replies: the service has not accepted it
                self.jobs.remove(job)
                raise
        return [202, {'id': job.id}]

    def find_unfinished(self, name: str, job_type: str, key: str | None) -> RecordedJob | None:
        """Return the unfinished job of a type that has a key, None if there is none."""
        for job in self._jobs_of(name):
            is_same = (job.type, job.options.get('key')) == (job_type, key)
            if key is not None and is_same and not job.is_ended:
                return job
        return None

    def answer(self, name: str, message_type: str, args: Any) -> _Status | None:
        """Return the reply of a service to a message about jobs, None for other messages."""
        if not message_type.startswith('pyams_zmq.job'):
            return None
        try:
            return [200, self._answer(name, message_type, args)]
        except (ZMQMessageError, ZMQJobError) as error:
            return [error.status, error.text]

    def _answer(self, name: str, message_type: str, args: Any) -> Any:
        match message_type:
            case 'pyams_zmq.job':
                job_id = read_id(args)
                return self._find(name, job_id)._describe(job_id)
            case 'pyams_zmq.job.wait':
                return self._wait(name, Wait(args))
            case 'pyams_zmq.job.cancel':
                self._find(name, Cancel(args).id).cancel()
                return None
            case 'pyams_zmq.job.retry':
                self._find(name, read_id(args)).retry()
                return None
            case 'pyams_zmq.jobs':
                return self._list(name, **read_page(args))
        raise ZMQMessageError(404, f'Unknown message type {message_type!r}')

    def _jobs_of(self, name: str) -> list[RecordedJob]:
        return [job for job in self.jobs if job.name == name]

    def _find(self, name: str, job_id: str) -> RecordedJob:
        for job in self._jobs_of(name):
            if job._has_id(job_id):
                return job
        raise ZMQMessageError(404, UNKNOWN)

    def _wait(self, name: str, wait: Wait) -> dict[str, Any]:
        jobs = {job_id: self._find(name, job_id) for job_id in wait.ids}
        for job_id, job in jobs.items():
            if wait.is_new(job_id, job.revision, job.is_ended):
                return job._describe(job_id)
        raise ZMQMessageError(
            409,
            f'Job {", ".join(jobs)} does not go on by itself in a test: use eager, replies or its '
            '`run`',
        )

    def _list(
        self,
        name: str,
        *,
        state: str | None,
        type: str | None,  # noqa: A002 - the name of the field
        limit: int,
        before: str | None,
    ) -> list[dict[str, Any]]:
        jobs = self._jobs_of(name)
        if before is not None:
            ids = [job.id for job in jobs]
            if before not in ids:
                raise ZMQMessageError(404, UNKNOWN_BEFORE)
            jobs = jobs[: ids.index(before)]
        found = [
            job for job in reversed(jobs) if state in (None, job.state) and type in (None, job.type)
        ]
        return [{**job._describe(job.id), 'reply': None} for job in found[:limit]]
