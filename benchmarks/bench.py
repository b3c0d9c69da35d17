# SPDX-License-Identifier: ZPL-2.1
"""Calls per second of all contenders, as ratios to a bare REQ/REP pair of pyzmq.

Each contender has a program for its server and one for its clients, in its own environment. In each
round every contender has a turn, in random order; the first round is a warm-up. A ratio is the
median of the ratios within a round. See `README.rst`.
"""

import argparse
import importlib.metadata
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from itertools import product
from math import inf
from pathlib import Path
from time import monotonic

import zmq

from contenders import BARE, CONTENDERS, ENVIRONMENTS, FLIGHT_BYTES, OURS
from results import (
    compare,
    count_rounds,
    list_failures,
    make_rows,
    make_rows_of_times,
    print_rst,
    print_table,
)

HERE = Path(__file__).resolve().parent
ENVIRONMENTS_FOLDER = HERE.parent / '.bench'
START_TIMEOUT = 60
TURN_TIMEOUT = 90
"""Seconds added to a turn; more than the limit of its clients, which report what they wait for"""


class MissingError(Exception):
    """A contender cannot be measured."""


class FailedError(Exception):
    """A turn has failed."""


class Program:
    """One side of a contender; see `side.py`.

    :param python: path of the interpreter
    :param role: `'server'` or `'clients'`
    :param pair: name of the pair
    """

    def __init__(self, python, role, pair):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        environ = dict(os.environ)
        if python != sys.executable:
            environ.pop('PYTHONPATH', None)  # it is meant for ours
        self._process = subprocess.Popen(  # noqa: S603 - of our own, or given by hand
            [python, '-W', 'ignore', HERE / 'side.py', role, pair],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environ,
            start_new_session=True,
        )

    @property
    def pid(self):
        """The pid of the program, which is also the session id of its children."""
        return self._process.pid

    def read(self, timeout):
        """Read a line of JSON.

        :raises MissingError: if the program reports that a package is missing
        :raises FailedError: if it reports an error, has ended, or sends no line in time
        """
        output = self._process.stdout
        if not select.select([output], [], [], timeout)[0]:
            raise FailedError(f'no line after {timeout:.0f} s')
        line = output.readline()
        if not line:
            raise FailedError(f'the program has ended: {self._read_last_error()}')
        fields = json.loads(line)
        if 'missing' in fields:
            raise MissingError(fields['missing'])
        if 'error' in fields:
            raise FailedError(fields['error'])
        return fields

    def _read_last_error(self):
        self._errors.seek(0)
        lines = self._errors.read().decode(errors='replace').splitlines()
        return lines[-1][:200] if lines else 'no error output'

    def ask(self, timeout, **fields):
        """Write a line of JSON and read the answer."""
        try:
            self._process.stdin.write(f'{json.dumps(fields)}\n'.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise FailedError(f'the program has ended: {self._read_last_error()}') from None
        return self.read(timeout)

    def end(self):
        """End the program and all processes of its session."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class Runner:
    """The two programs of a contender.

    :param python: path of the interpreter of its environment
    """

    def __init__(self, contender, python):
        self._flight = contender.flight
        self._stack = ExitStack()
        self._server, self._clients = (
            Program(python, role, contender.pair) for role in ('server', 'clients')
        )
        self._stack.callback(self._server.end)
        self._stack.callback(self._clients.end)
        self.end = self._stack.close

    def wait(self):
        """Wait until both programs are ready.

        :raises MissingError: if a program does not start
        """
        try:
            self._address = self._server.read(START_TIMEOUT)['address']
            self._clients.read(START_TIMEOUT)
        except FailedError as error:
            raise MissingError(f'it does not start: {error}') from None

    def run_turn(self, payload, clients, seconds):
        """Run a turn; return the figures of `side.run_turn`."""
        flight = max(1, min(self._flight, FLIGHT_BYTES // payload) // clients)
        return self._clients.ask(
            TURN_TIMEOUT + seconds,
            address=self._address,
            size=payload,
            clients=clients,
            flight=flight,
            seconds=seconds,
            server=self._server.pid,
        )


def start_runners(names, pythons, stack):
    """Start the programs of contenders; return the running ones and the reasons of the others."""
    runners, missing = {}, {}
    for name in names:
        contender = CONTENDERS[name]
        python = pythons[contender.environment]
        if Path(python).exists():
            runners[name] = Runner(contender, python)
            stack.callback(runners[name].end)
        else:
            missing[name] = explain_environment(contender.environment)
    for name, runner in list(runners.items()):
        try:
            runner.wait()
        except MissingError as error:
            missing[name] = str(error)
            runners.pop(name).end()
    return runners, missing


def explain_environment(name):
    """Return the reason why an environment is missing."""
    try:
        return (ENVIRONMENTS_FOLDER / f'{name}.failed').read_text(encoding='utf-8').strip()
    except FileNotFoundError:
        return f'no environment {name!r}; run "make bench" to create it'


def measure(runners, payload, clients, rounds, seconds, until=inf, show=None):
    """Measure a cell: all contenders in turn, for some rounds.

    :param until: time of `monotonic` after which no further round begins; one round always counts
    :param show: function to call with a text about the progress
    """
    rates = {name: [] for name in runners}
    times = {name: [] for name in runners}
    failed = {}
    rng = random.Random(20)  # noqa: S311 - the same orders each time
    for number in range(rounds + 1):
        if show is not None:
            show(f'{payload} bytes, {clients} clients, round {number} of {rounds}')
        # In random order, so that no contender always runs after the same one.
        for name in rng.sample(list(rates), len(rates)):
            try:
                turn = runners[name].run_turn(payload, clients, seconds)
            except (FailedError, MissingError) as error:
                failed[name] = str(error)
                del rates[name], times[name]
            else:
                if number:  # the first round warms up
                    rates[name].append(turn['rate'])
                    times[name].append([turn['client'], turn['server']])
        if number and monotonic() > until:
            break
    return {
        'payload': payload,
        'clients': clients,
        'rates': rates,
        'times': times,
        'failed': failed,
    }


def describe_machine():
    """Return versions and number of processors."""
    return {
        'python': '.'.join(map(str, sys.version_info[:3])),
        'pyzmq': zmq.__version__,
        'libzmq': zmq.zmq_version(),
        'processors': len(os.sched_getaffinity(0)),  # `taskset` leaves fewer
        'pyams_zmq': importlib.metadata.version('pyams_zmq'),
    }


def show_progress(text):
    """Write the progress to a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f'\r{text:70}\r')


def run(arguments):
    """Measure the cells that the command line names; return the run."""
    pythons = {name: str(ENVIRONMENTS_FOLDER / name / 'bin/python') for name in ENVIRONMENTS}
    pythons[OURS] = sys.executable
    pythons.update(pair.split('=', 1) for pair in arguments.python)
    result = {
        'machine': describe_machine(),
        'seconds': arguments.seconds,
        'names': arguments.only,
        'missing': {},
        'cells': [],
    }
    with ExitStack() as stack:
        runners, result['missing'] = start_runners(arguments.only, pythons, stack)
        deadline = monotonic() + arguments.minutes * 60
        left = len(arguments.payload) * len(arguments.clients)
        for size, number in product(arguments.payload, arguments.clients):
            left -= 1
            until = monotonic() + (deadline - monotonic()) / (left + 1)
            result['cells'].append(
                measure(
                    runners,
                    size,
                    number,
                    arguments.rounds,
                    arguments.seconds,
                    until,
                    show_progress,
                )
            )
            save(result, arguments.save)  # after each cell, in case the run is interrupted
    show_progress('')
    return result


def save(result, path):
    """Save a run, if a path is given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=1), encoding='utf-8')


def load(path):
    """Return a saved run."""
    return json.loads(Path(path).read_text(encoding='utf-8'))


def report(result, write, form=print_table, make=make_rows):
    """Write the machine, the table and the failures."""
    machine = result['machine']
    write(
        f'pyams_zmq {machine["pyams_zmq"]}, Python {machine["python"]}, pyzmq {machine["pyzmq"]}, '
        f'libzmq {machine["libzmq"]}, {machine["processors"]} processors; '
        f'medians of {count_rounds(result)} rounds, turns of {result["seconds"]:g} s\n\n'
    )
    form(make(result), write)
    for line in list_failures(result):
        write(f'failed: {line}\n')


def numbers(text):
    """Parse positive integers separated by commas."""
    values = [int(part) for part in text.split(',')]
    if min(values) < 1:
        raise ValueError(text)
    return values


def names(text):
    """Return the bare pair and the contenders whose names contain one of the given words.

    :raises ValueError: if no name matches
    """
    words = [word.strip().lower() for word in text.split(';')]
    found = [name for name in CONTENDERS if any(word in name.lower() for word in words)]
    if not found:
        raise ValueError(text)
    return [BARE, *(name for name in found if name != BARE)]


def parse_arguments(args=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('--rounds', type=int, default=5, help='rounds after the warm-up (5)')
    add(
        '--minutes',
        type=float,
        default=12,
        help='limit; then cells get fewer rounds (12)',
    )
    add('--seconds', type=float, default=0.25, help='duration of a turn (0.25)')
    add('--only', type=names, default=list(CONTENDERS), help='parts of names, separated by ;')
    add('--payload', type=numbers, default=[60, 10_000, 1_000_000], help='bytes (60,10000,1000000)')
    add('--clients', type=numbers, default=[1, 8, 64], help='numbers of clients (1,8,64)')
    add('--python', action='append', default=[], metavar='ENVIRONMENT=PATH', help='an interpreter')
    add('--save', metavar='FILE', help='save the run as JSON')
    add('--compare', nargs=2, metavar=('OLD', 'NEW'), help='compare two saved runs instead')
    add('--show', metavar='FILE', help='show the chosen cells of a saved run instead')
    add('--cpu', action='store_true', help='write processor time for each call instead of ratios')
    add('--rst', action='store_true', help='write the table for the documentation')
    return parser.parse_args(args)


def main():
    """Run the benchmark."""
    arguments = parse_arguments()
    # SystemExit unwinds the stack, which ends the programs.
    signal.signal(signal.SIGTERM, lambda _num, _frame: sys.exit(1))
    form = print_rst if arguments.rst else print_table
    write = sys.stdout.write
    if arguments.compare:
        form(compare(*map(load, arguments.compare)), write)
        return
    if arguments.show:
        result = load(arguments.show)
        wanted = set(product(arguments.payload, arguments.clients))
        result['cells'] = [
            cell for cell in result['cells'] if (cell['payload'], cell['clients']) in wanted
        ]
    else:
        result = run(arguments)
    report(result, write, form, make_rows_of_times if arguments.cpu else make_rows)


if __name__ == '__main__':
    main()
