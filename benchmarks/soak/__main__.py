# SPDX-License-Identifier: ZPL-2.1
"""Mixed load on real services, and then jobs, with faults at random times; then checks.

The faults and their order depend on the seed, which is printed first. The exit status is 1 if
anything was wrong, lost or leaked; the problems are listed.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.process.descendants import become_subreaper
from soak import checks, jobs
from soak.faults import POOL, Faults
from soak.load import CALL_TIMEOUT, SEND_TIMEOUT
from soak.peers import Relay
from soak.programs import Program, Sampler, end_descendants, reserved_address, restart_ended
from soak.services import FACTORIES

PATHS = {
    'single': {'load', 'single'},
    'steady': {'load', 'relay', 'steady'},
    'concurrent': {'load', 'concurrent'},
    'pool': {'load', 'pool', *POOL},
    'device': {'load', 'device', 'concurrent'},
}
"""Targets of faults that a message passes on each route"""

RECOVERY = 30.0
"""Seconds in which all services answer again at the end"""


class Soak:
    """The programs, the faults and the findings of one soak.

    :param folder: folder for journals and logs
    :param seed: start of all random numbers
    :param pause: mean seconds between two calls of a thread of the load
    """

    def __init__(self, folder, seed, pause, stack):
        self.folder = folder
        self.problems = []
        self.addresses = {name: stack.enter_context(reserved_address()) for name in PATHS}
        self.routes = {**self.addresses, 'steady': stack.enter_context(reserved_address())}
        self.services = {
            name: Program(name, folder, 'soak.services', name, self.addresses[name])
            for name in FACTORIES
        }
        self.services['device'] = Program(
            *('device', folder, 'soak.services', 'device', self.addresses['device']),
            self.addresses['concurrent'],
        )
        routes = [f'{name}={address}' for name, address in self.routes.items()]
        self.record = folder / 'load.told'
        self.load = Program(
            *('load', folder, 'soak.load', 'load', str(self.record), str(seed), str(pause)),
            *routes,
        )
        self.programs = [*self.services.values(), self.load]
        self.relay = Relay(self.routes['steady'], self.addresses['steady'])
        self.faults = Faults(folder, self.services, self.addresses, self.load, self.relay)
        self.sampler = Sampler(self.programs)

    # Life

    def start(self):
        """Start all programs, the load when the services answer."""
        for program in self.services.values():
            program.start()
        self.relay.start()
        self.wait_for_services()
        self.load.start()
        self.sampler.start()

    def wait_for_services(self):
        """Wait until each service answers; those that do not are problems."""
        deadline = time.monotonic() + RECOVERY
        for name, address in self.routes.items():
            with ZMQClient(address, timeout=2) as client:
                while True:
                    try:
                        client.call('nap', 0)
                        break
                    except ZMQBaseError as error:
                        if time.monotonic() > deadline:
                            self.problems.append(f'{name} does not answer: {error}')
                            break
                    time.sleep(0.1)

    def finish(self):
        """End the load, wait for what it has sent, stop all programs; note what does not end."""
        self.load.process.stdin.write(b'\n')
        self.load.process.stdin.flush()
        self.problems += restart_ended(self.programs)
        stop = time.monotonic() + CALL_TIMEOUT + checks.MARGIN
        while not self.has_stopped() and time.monotonic() < stop:
            time.sleep(0.1)
        if not self.has_stopped():
            self.problems.append('a call does not end; the log of the load shows where')
            self.load.process.send_signal(signal.SIGUSR1)
        self.wait_for_services()
        stop = time.monotonic() + SEND_TIMEOUT + checks.MARGIN
        while self.count_missing() and time.monotonic() < stop:
            time.sleep(0.2)
        self.sampler.stop()
        self.end_programs()

    def has_stopped(self):
        """Return True if the load has ended its calls."""
        return os.path.exists(f'{self.record}.stopped')

    def end_programs(self):
        """Stop all programs; note those that do not end, and what they leave behind."""
        self.load.process.stdin.close()
        for program in [self.load, *self.services.values()]:
            code = program.wait(30) if program is self.load else program.stop()
            if code != 0:
                self.problems.append(f'{program.name} at its end: exit code {code}')
                program.kill()
        self.relay.stop()
        self.problems += end_descendants(os.getpid())

    # Findings

    def read(self):
        """Return what the clients have recorded, and what the services have run."""
        told = checks.read_told(self.record.read_text(encoding='ascii'))
        runs = {
            name: checks.read_runs(program.journal.read_text(encoding='ascii'))
            for name, program in self.services.items()
            if program.journal.exists()
        }
        return told, runs

    def count_missing(self):
        """Return how many accepted messages have neither been run nor logged as lost."""
        at_risk, lost = checks.find_lost(*self.read(), PATHS, self.faults.interruptions)
        losses = checks.read_losses(self.load.read_log())
        return max(0, len(at_risk) + len(lost) - sum(loss.times for loss in losses))

    def check(self):
        """Return the problems by check, and the counts for the summary."""
        told, runs = self.read()
        at_risk, lost = checks.find_lost(told, runs, PATHS, self.faults.interruptions)
        losses = checks.read_losses(self.load.read_log())
        found = {
            'wrong': [
                *checks.check_ends(told, CALL_TIMEOUT),
                *checks.check_failures(told, PATHS, self.faults.interruptions),
                *checks.check_runs(told, runs),
                *checks.check_order(told, runs, PATHS, self.faults.interruptions),
            ],
            'lost': [
                *(f'{each.token} to {each.route} was accepted and not run' for each in lost),
                *checks.check_losses(at_risk, losses, self.routes),
            ],
            'processes': [*self.problems, *self.faults.problems, *self.sampler.zombies],
            'growth': [],
            'logs': [],
        }
        for (program, pid), samples in self.sampler.samples.items():
            for unit, values in samples.items():
                found['growth'] += checks.check_growth(f'{program} {pid}', unit, values)
        for program in self.programs:
            found['logs'] += checks.check_log(program.name, program.read_log())
        counts = defaultdict(Counter)
        for each in told:
            counts[each.kind][each.end] += 1
        counts['at risk'] = Counter(each.route for each in at_risk)
        return found, counts

    def print_summary(self, found, counts):
        """Print counts, the memory of the processes that live longest, and the problems."""
        for kind, ends in counts.items():
            print(f'{kind:10}', ', '.join(f'{end} {count}' for end, count in ends.most_common()))
        print(
            f'{"faults":10}', ', '.join(f'{kind} {n}' for kind, n in self.faults.done.most_common())
        )
        print('\nprocess                   seconds  KiB first     last  files  last')
        names = {program.name: program.names() for program in self.programs}
        for (program, pid), samples in self.sampler.samples.items():
            memory, files = samples.values()
            if len(memory) >= checks.MIN_LIFE or program == 'load':
                name = names[program].get(pid, f'{program} {pid}')
                first = len(memory) // 5
                print(
                    f'{name:24} {len(memory):8} {memory[first]:10} {memory[-1]:8} '
                    f'{files[first]:6} {files[-1]:5}'
                )
        print()
        for name, problems in found.items():
            print(f'{name:10} {len(problems)}')
            for problem in problems[:20]:
                print(f'    {problem}')


def run_mixed(folder, seed, args, stack):
    """Run the mixed load; return True if there are problems."""
    soak = Soak(folder, seed, args.pause, stack)
    try:
        soak.start()
        soak.faults.run(seed, args.minutes * 60)
        soak.finish()
    finally:
        for program in soak.programs:
            if program.process is not None and program.process.poll() is None:
                program.kill()
    found, counts = soak.check()
    soak.print_summary(found, counts)
    return any(found.values())


def main():
    """Run the soak; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--minutes', type=float, default=10, help='of mixed load (10; 0 for none)')
    parser.add_argument('--jobs', type=int, default=1000, help='in each run (1000; 0 for none)')
    parser.add_argument('--runs', nargs='+', choices=jobs.RUNS, default=list(jobs.RUNS))
    parser.add_argument('--seed', type=int, help='repeat the faults of this seed')
    parser.add_argument('--pause', type=float, default=0.1, help='between two calls of a thread')
    parser.add_argument('--keep', type=Path, help='keep journals and logs in this empty folder')
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f'seed {seed}', flush=True)
    become_subreaper()
    is_bad = False
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.minutes > 0:
            is_bad = run_mixed(folder, seed, args, stack)
        if args.jobs > 0:
            is_bad = jobs.run_all(folder, seed, args.jobs, args.runs) or is_bad
    print(f'seed {seed}')
    return int(is_bad)


if __name__ == '__main__':
    sys.exit(main())
