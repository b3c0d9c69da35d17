# SPDX-License-Identifier: ZPL-2.1
"""A service with jobs, as far as a client can see it: the messages about jobs, without a disk.

The jobs are those of :class:`client_jobs.ClientJobs`, which a pool runs.
"""

import json
import re
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from uuid import uuid4

import zmq

ENDED = ('done', 'failed', 'cancelled', 'expired')
POLL = 5  # milliseconds


class Job:
    """One job of the service.

    :ivar lines: lines of the file that it has read
    """

    def __init__(self, name, args, frames, options):
        now = time.time()
        self.id = options.get('id', str(uuid4()))
        self.type, self.args, self.frames = name, args, frames
        self.key = options.get('key')
        self.options = options
        self.state = 'waiting'
        self.attempt = self.failures = 0
        self.created, self.started, self.ended = now, None, None
        self.due = now + options['delay'] if options.get('delay') else None
        self.expires = now + options['expires'] if 'expires' in options else None
        self.progress = self.reply = None
        self.revision = int(now * 1000)

    def change(self, **values):
        """Change the job; its revision changes, too."""
        vars(self).update(values)
        self.revision = max(self.revision + 1, int(time.time() * 1000))

    def end(self, state, reply=None):
        self.change(state=state, reply=reply, ended=time.time())

    def step(self, now):
        """Begin, go on, or end."""
        if self.state == 'waiting':
            if self.expires is not None and now > self.expires:
                self.end('expired')
            elif self.due is None or now >= self.due:
                self.change(state='running', attempt=self.attempt + 1, started=now)
        elif self.state == 'running':
            getattr(self, f'run_{self.type}')()

    def run_echo(self):
        self.end('done', [200, self.args])

    def run_measure(self):
        self.end('done', [200, [len(frame) for frame in self.frames]])

    def run_fail(self):
        self.failures += 1
        self.end('failed', [self.args, 'it has failed'])

    def run_follow(self):
        """Follow a file: each line is a progress, the last one is `end`."""
        path = Path(self.args)
        lines = path.read_text().splitlines() if path.exists() else []
        if 'end' in lines:
            self.end('done', [200, len(lines) - 1])
        elif lines and (self.progress is None or self.progress['done'] != len(lines)):
            self.change(progress={'done': len(lines), 'total': 4, 'text': lines[-1]})

    def describe(self, with_reply=True):
        eta = None if self.progress is None else 1.5
        return {
            'id': self.id,
            'type': self.type,
            'state': self.state,
            'attempt': self.attempt,
            'failures': self.failures,
            'progress': self.progress,
            'eta': eta,
            **{
                name: None
                if getattr(self, name) is None
                else f'{datetime.fromtimestamp(getattr(self, name), timezone.utc):%FT%T.%fZ}'
                for name in ('created', 'due', 'started', 'ended')
            },
            'revision': self.revision,
            'reply': self.reply if with_reply else None,
            'unknown': 'a member of a later version',
        }


class JobService:
    """Runs jobs in a thread; the jobs survive `stop` and `start`.

    :ivar messages: the messages that it has received
    """

    TYPES = ('echo', 'measure', 'fail', 'follow')

    def __init__(self, address):
        self.bound_address = address
        self.jobs = {}
        self.messages = []
        self.refusal = None
        self._waiters = []
        self._thread = None

    def start(self):
        self._stop = threading.Event()
        self._is_dropping = False
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,))
        self._thread.start()
        assert ready.wait(10)

    def stop(self):
        self._stop.set()
        self._thread.join()

    def drop_next_reply(self):
        """Close the connections after the next message that submits a job, and go on."""
        self._is_dropping = True

    def _run(self, ready):
        while not self._stop.is_set():
            # A context each time: its end waits until the file of the former socket is gone.
            with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
                socket.linger = 100
                socket.bind(self.bound_address)
                ready.set()
                self._serve(socket)
                self._waiters.clear()

    def _serve(self, socket):
        while not self._stop.is_set():
            if socket.poll(POLL):
                envelope, frames = self._receive(socket)
                reply = self._answer(envelope, *frames)
                if self._is_dropping and self.messages[-1][0] in self.TYPES:
                    self._is_dropping = False
                    return
                if reply is not None:
                    self._send(socket, envelope, reply)
            now = time.time()
            for job in list(self.jobs.values()):
                job.step(now)
            for waiter in self._waiters[:]:
                self._notify(socket, waiter)

    def _receive(self, socket):
        frames = socket.recv_multipart()
        middle = frames.index(b'')
        return frames[: middle + 1], frames[middle + 1 :]

    def _send(self, socket, envelope, reply):
        socket.send_multipart([*envelope, json.dumps(reply).encode()])

    def _answer(self, envelope, *frames):
        name, args, *rest = message = json.loads(frames[-1])
        self.messages.append(message)
        if self.refusal is not None:
            return self.refusal
        if name in self.TYPES:
            return self._submit(name, args, frames[:-1], *rest)
        if name == 'pyams_zmq.job.wait':
            return self._wait(envelope, args)
        method = getattr(self, '_' + re.sub('.*[.]', '', name), None)
        return [404, f'Unknown message type {name!r}'] if method is None else method(args)

    def _submit(self, name, args, frames, options=None):
        options = options or {}
        job = Job(name, args, frames, options)
        for known in self.jobs.values():
            if known.id == job.id or (
                job.key is not None and (known.key, known.ended) == (job.key, None)
            ):
                return [200, {'id': known.id}]
        self.jobs[job.id] = job
        return [202, {'id': job.id}]

    def _job(self, job_id):
        job = self.jobs.get(job_id)
        return [404, 'Unknown job id'] if job is None else [200, job.describe()]

    def _jobs(self, args):
        found = list(reversed(self.jobs.values()))
        if 'before' in args:
            names = [job.id for job in found]
            found = found[names.index(args['before']) + 1 :]
        found = [
            job
            for job in found
            if args.get('state') in (None, job.state) and args.get('type') in (None, job.type)
        ]
        return [200, [job.describe(with_reply=False) for job in found[: args.get('limit', 100)]]]

    def _cancel(self, args):
        job = self.jobs.get(args['id'])
        if job is None:
            return self._job(args['id'])
        if job.ended is not None:
            return [409, f'The job has ended, it is {job.state}']
        job.end('cancelled')
        return [200, None]

    def _retry(self, job_id):
        job = self.jobs.get(job_id)
        if job is None:
            return self._job(job_id)
        if job.state not in ENDED or job.state == 'done':
            return [409, f'The job is {job.state}']
        job.change(state='waiting', ended=None, reply=None, failures=0)
        return [200, None]

    def _wait(self, envelope, args):
        after = args.get('after')
        known = {args['id']: after} if 'id' in args else dict.fromkeys(args['ids'], None)
        if 'ids' in args:
            known.update(after or {})
        for job_id in known:
            if job_id not in self.jobs:
                return self._job(job_id)
        self._waiters.append((envelope, known, time.time() + args['timeout']))
        return None

    def _notify(self, socket, waiter):
        envelope, known, end = waiter
        changed = [key for key, value in known.items() if self.jobs[key].revision != value]
        if changed or time.time() >= end:
            self._waiters.remove(waiter)
            job = self.jobs[changed[0] if changed else next(iter(known))]
            self._send(socket, envelope, [200, job.describe()])


@contextmanager
def job_service(address):
    """Run a service with jobs; at the end it stops."""
    service = JobService(address)
    service.start()
    try:
        yield service
    finally:
        service.stop()
