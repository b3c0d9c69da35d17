# SPDX-License-Identifier: ZPL-2.1
"""What the broker sends to workers about jobs."""

import logging

from pyams_zmq.pool import protocol
from pyams_zmq.pool.job_run import JobRun
from pyams_zmq.pool.protocol import SEPARATOR, JobHeader, make_job_header
from pyams_zmq.pool.scheduler import WorkerState
from pyams_zmq.process.descendants import kill_with_descendants
from pyams_zmq.wire.log_fields import extra

LOGGER = logging.getLogger('PyAMS (zmq)')


def send_job(worker: WorkerState, run: JobRun) -> bool:
    """Send a job to a worker; return False if that is unreachable."""
    record = run.record
    header = JobHeader(record.id, record.type, record.attempt, record.timeout)
    sender = record.user.encode() + SEPARATOR + record.address.encode()
    data = make_job_header(run.key, header, sender)
    sent: bool = worker.stream.send_frames([worker.route, data, *record.frames])
    return sent


def send_command(command: bytes, worker: WorkerState, key: bytes, **options: bytes) -> None:
    """Send a command about a job that a worker has."""
    worker.stream.send_frames([worker.route, b'', command, key, *options.values()])


def kill_worker(run: JobRun, *, is_local: bool) -> None:
    """End the worker of a job that was cancelled.

    :param is_local: True if it runs on this machine
    """
    worker = run.worker
    worker.was_asked = True  # its other jobs are not the cause
    LOGGER.warning(
        'The job %s (%s) was cancelled; its worker %s of %s is ended',
        run.record.id,
        run.record.type,
        worker.pid,
        worker.host,
        extra=extra(method=run.record.type, job=run.record.id),
    )
    if is_local:
        kill_with_descendants(worker.pid)
    else:
        send_command(protocol.CANCEL, worker, run.key, force=b'1')
