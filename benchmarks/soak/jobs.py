# SPDX-License-Identifier: ZPL-2.1
"""A soak of jobs: kills at random times, and no job may be lost, or begin again after its end."""

import os
import time

import zmq.auth

from pyams_zmq.client import ZMQClient
from soak import checks, job_checks
from soak.job_faults import JobFaults, plan
from soak.job_programs import read_record
from soak.programs import Program, end_descendants, reserved_address

SECONDS = 0.2
"""Seconds of each job"""

FAULTS = 0.1
"""Faults for each job"""

PAUSE = 0.08
"""Mean seconds between two submits, so that workers are always busy, and jobs accepted for long"""

FINISH = 120.0
"""Seconds in which all jobs end after the last fault"""

RUNS = {
    'kills-1': (0, {}),
    'kills-2': (1, {}),
    'kills-3': (2, {}),
    'stops': (0, {'has_stops': True}),
    'curve': (0, {'is_remote': True, 'has_stops': True}),
}
"""What is added to the seed, and options of :class:`JobSoak`, by the name of a run"""


class JobSoak:
    """A service with a journal, clients, and faults.

    :param folder: an empty folder
    :param seed: start of the random numbers
    :param number: number of jobs
    :param has_stops: true if processes are stopped (SIGSTOP), too
    :param is_remote: true for workers in two programs of their own, which connect over CURVE
    """

    def __init__(self, folder, seed, number, *, has_stops=False, is_remote=False, seconds=SECONDS):
        self._folder = folder
        self._number = number
        self._seconds = seconds
        self._faults = list(plan(seed, int(number * FAULTS), has_stops))
        self._is_remote = is_remote
        self._record = folder / 'client.told'
        self._record.touch()

    def run(self):
        """Run it; return the problems by check, and the figures."""
        with reserved_address() as address, reserved_address() as worker_address:
            self._make_programs(address, worker_address)
            begin = time.monotonic()
            problems = []
            try:
                for program in self._programs:
                    program.start()
                faults = JobFaults(self._service, self._client, self._elsewhere)
                faults.run(self._faults)
                if self._client.wait(FINISH) != 0:
                    problems.append(f'not all jobs have ended {FINISH:.0f} s after the last fault')
                seconds = time.monotonic() - begin
                jobs = self._read_jobs(address)
                for program in [*self._elsewhere, self._service]:
                    code = program.stop()
                    if code != 0:
                        problems.append(f'{program.name} at its end: exit code {code}')
            finally:
                for program in self._programs:
                    if program.process is not None and program.process.poll() is None:
                        program.kill()
        problems += end_descendants(os.getpid())
        found, figures = self._check(jobs)
        found['processes'] = problems
        figures |= {'seconds': round(seconds), **faults.done}
        return found, figures

    def _make_programs(self, address, worker_address):
        folder = self._folder
        service = [address, str(folder / 'service.jobs'), '1' if self._is_remote else '2']
        self._elsewhere = []
        if self._is_remote:
            for name in ('broker', 'worker'):
                zmq.auth.create_certificates(folder, name)
            service += [str(folder), worker_address]
            keys = ('--key', f'{folder}/worker.key_secret', '--server-key', f'{folder}/broker.key')
            worker = ('pyams_zmq', 'worker', worker_address, 'soak.job_programs.JobWork', *keys)
            self._elsewhere = [Program(f'elsewhere{n}', folder, *worker) for n in (1, 2)]
        module = 'soak.job_programs'
        self._service = Program('service', folder, module, 'serve', *service)
        client = (
            address,
            str(self._number),
            str(self._seconds),
            str(PAUSE * self._seconds / SECONDS),
        )
        self._client = Program('client', folder, module, 'client', str(self._record), *client)
        self._programs = [self._service, *self._elsewhere, self._client]

    def _read_jobs(self, address):
        """Return the jobs that the service knows at the end."""
        jobs = {}
        with ZMQClient(address, timeout=FINISH) as client:
            page = client.jobs(limit=100)
            while page:
                jobs |= {job.id: client.job(job.id) for job in page}  # lists have no replies
                page = client.jobs(limit=100, before=page[-1].id)
        return jobs

    def _check(self, jobs):
        told = read_record(self._record.read_text(encoding='ascii'))
        texts = [
            program.journal.read_text(encoding='ascii')
            for program in self._programs
            if program.journal.exists()
        ]
        runs = checks.read_runs(''.join(texts))
        found = {
            'lost': [*job_checks.check_lost(told['accepted'], jobs, runs)],
            'begun again': [*job_checks.check_begun_again(told['ended'], jobs, runs)],
            'repeated': [*job_checks.check_repeated(self._number, runs)],
            'logs': [],
        }
        for program in self._programs:
            found['logs'] += checks.check_log(program.name, program.read_log())
        begins = job_checks.count_begins(runs)
        figures = {
            'jobs': len(jobs),
            'accepted': len(told['accepted']),
            'given up': len(job_checks.find_given_up(jobs, runs)),
            'begun more than once': sum(count > 1 for count in begins.values()),
        }
        return found, figures


def run_all(folder, seed, number, names=tuple(RUNS)):
    """Run the soaks of jobs; return True if there are problems."""
    is_bad = False
    for name in names:
        own = folder / name
        own.mkdir()
        more, options = RUNS[name]
        found, figures = JobSoak(own, seed + more, number, **options).run()
        print(f'\njobs, {name}')
        print(', '.join(f'{key} {count}' for key, count in figures.items()))
        for check, problems in found.items():
            is_bad = is_bad or bool(problems)
            print(f'{check:12} {len(problems)}', flush=True)
            for problem in problems[:20]:
                print(f'    {problem}')
    return is_bad
