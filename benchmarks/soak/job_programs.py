# SPDX-License-Identifier: ZPL-2.1
"""The programs of a soak of jobs: a service, its workers elsewhere, and clients.

An attempt writes a line to the journal of its program when it begins: the time, the pid, the id of
the job and the number of the attempt. The client writes one to its record when a job was accepted,
and when it has seen its end.
"""

import logging
import os
import random
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import sleep, time

from pyramid.testing import setUp

from pyams_zmq.client import ZMQClient
from pyams_zmq.curve import CurveServer
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.jobs import zmq_job
from pyams_zmq.pool import ZMQPool
from pyams_zmq.supervisor import Supervisor
from soak.services import JOURNAL, LOG_FORMAT

SERVICE = 'jobs'
"""Name of the service"""

SUBMITTERS = 4
"""Threads of a client that submit jobs"""

WATCHED = 100
"""Jobs that a client watches at a time"""

PATIENCE = 20.0
"""Seconds that a client waits for a reply, or for a service that starts again"""


class JobWork:
    """Jobs that take some time."""

    @zmq_job()
    def work(self, args, *, job):
        """Sleep, and return the id of the job."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(os.environ[JOURNAL], flags)
        os.write(fd, f'{time():.6f} {os.getpid()} {job.id}/{job.attempt}\n'.encode())
        os.close(fd)
        sleep(args['seconds'])
        return [200, job.id]


class WorkPool(ZMQPool):
    """Pool with a journal."""

    jobs = 2


class PatientSupervisor(Supervisor):
    """Supervisor of a service that is killed more often than it would ever be."""

    max_delay = 0.5
    max_starts = 1000


def serve(address, journal, workers, keys=None, worker_address=None):
    """Run the service until SIGTERM; return the exit code.

    :param journal: path of its journal
    :param keys: folder with the keys for workers elsewhere, see `make_keys`
    """
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    setUp(hook_zca=True)
    options = {}
    if keys is not None:
        curve = CurveServer(f'{keys}/broker.key_secret', [f'{keys}/worker.key'])
        options = {'worker_address': worker_address, 'worker_curve': curve}
    WorkPool.journal = journal
    factory = partial(WorkPool, address, JobWork, workers=int(workers), **options)
    return PatientSupervisor({SERVICE: factory}).run()


class Client:
    """Submits jobs and watches them; one that was killed goes on when it is started again.

    :param record: path of the record
    :param address: address of the service
    :param number: number of jobs
    :param seconds: seconds of each job
    :param pause: mean seconds between two submits
    """

    def __init__(self, record, address, number, seconds, pause):
        self._record = os.open(record, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._address = address
        self._seconds = seconds
        self._pause = pause * SUBMITTERS
        told = read_record(Path(record).read_text(encoding='ascii'))
        self.accepted = dict.fromkeys(told['accepted'])
        self.ended = set(told['ended'])
        self.ids = [f'job-{index}' for index in range(number)]

    def run(self):
        """Return when all jobs have ended."""
        threads = [
            threading.Thread(target=self._submit, args=(self.ids[part::SUBMITTERS],), daemon=True)
            for part in range(SUBMITTERS)
        ]
        for thread in threads:
            thread.start()
        with ZMQClient(self._address, timeout=PATIENCE) as client:
            while len(self.ended) < len(self.ids):
                ids = [each for each in list(self.accepted) if each not in self.ended][:WATCHED]
                with suppress(ZMQBaseError):
                    self._watch(client, ids)

    def _submit(self, ids):
        rng = random.Random()  # noqa: S311 - no secret
        with ZMQClient(self._address, timeout=PATIENCE) as client:
            for each in ids:
                while each not in self.accepted:
                    sleep(rng.expovariate(1 / self._pause))
                    with suppress(ZMQBaseError):
                        client.submit('work', {'seconds': self._seconds}, id=each)
                        self._note('accepted', each)
                        self.accepted[each] = None

    def _watch(self, client, ids):
        if not ids:
            sleep(self._pause)
            return
        for job in client.watch(ids, patience=PATIENCE):
            if job.is_ended:
                self._note('ended', job.id)
                self.ended.add(job.id)
                return  # others were accepted meanwhile

    def _note(self, event, job_id):
        os.write(self._record, f'{time():.6f} {event} {job_id}\n'.encode())


def read_record(text):
    """Return the times of the events of a client, by event and id."""
    events = {'accepted': {}, 'ended': {}}
    for line in text.splitlines():
        seconds, event, job_id = line.split()
        events[event][job_id] = float(seconds)
    return events


if __name__ == '__main__':
    if sys.argv[1] == 'serve':
        sys.exit(serve(*sys.argv[2:]))
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    Client(sys.argv[2], sys.argv[3], int(sys.argv[4]), *map(float, sys.argv[5:])).run()
