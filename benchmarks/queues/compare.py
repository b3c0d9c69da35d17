# SPDX-License-Identifier: ZPL-2.1
"""The queues beside each other: rates, and what they lose when processes are killed."""

import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from queues import CONTENDERS, OURS
from queues.service import FailedError, Service, measure_losses, measure_rates

ENVIRONMENTS = Path(__file__).resolve().parents[2] / '.bench'
WORDS = ('accepted/s', 'ended/s', 'ours is', 'on disk', 'kills', 'lost', 'twice')
JOBS = 200
SECONDS = 0.1
"""Number and duration of the jobs whose processes are killed"""

AT_A_TIME = 3
"""Queues that are killed at the same time: most of the time they wait"""


def find_pythons(names, environments):
    """Return the interpreter of each contender, and the reasons of those that have none.

    :param environments: folder of the environments
    """
    pythons, missing = {}, {}
    for name in names:
        environment = CONTENDERS[name].environment
        python = environments / environment / 'bin/python'
        if environment == OURS:
            pythons[name] = sys.executable
        elif python.exists():
            pythons[name] = str(python)
        else:
            failed = environments / f'{environment}.failed'
            missing[name] = (
                failed.read_text(encoding='utf-8').strip()
                if failed.exists()
                else 'not installed: run environments.py queues'
            )
    return pythons, missing


def run(name, python, folder, measure, *args, seconds=0.0):
    """Measure a contender in a folder of its own.

    :return: the figures, or a text if it fails
    """
    with tempfile.TemporaryDirectory(dir=folder) as own:
        try:
            with Service(CONTENDERS[name], python, own, seconds) as service:
                return measure(service, *args)
        except (FailedError, OSError) as error:
            return str(error)


def compare(args, write):
    """Measure all contenders in turn, kill their processes, and print a table."""
    words = [word.strip().lower() for word in args.only.split(';')]
    names = [name for name in CONTENDERS if any(word in name.lower() for word in words)]
    pythons, missing = find_pythons(names, args.environments)
    rates = {name: [] for name in pythons}
    rng = random.Random(20)  # noqa: S311 - the same orders each time
    for _ in range(args.rounds):
        for name in rng.sample(list(rates), len(rates)):
            figures = run(
                *(name, pythons[name], args.folder, measure_rates),
                *(args.clients, args.seconds, args.seconds + 10),
            )
            if isinstance(figures, str):
                missing[name] = figures
                del rates[name]
            else:
                rates[name].append(figures)
    losses = {}
    if args.kills:
        with ThreadPoolExecutor(AT_A_TIME) as executor:
            waits = {
                name: executor.submit(
                    *(run, name, pythons[name], args.folder, measure_losses),
                    *(JOBS, args.kills, args.patience),
                    seconds=SECONDS,
                )
                for name in rates
            }
            losses = {name: wait.result() for name, wait in waits.items()}
    print_table(rates, losses, missing, write)


def print_table(rates, losses, missing, write):
    """Print a row for each contender."""
    write(f'{"":<32}' + ''.join(f'{word:>12}' for word in WORDS) + '\n')
    if rates:
        ours = median(each['ended'] for each in next(iter(rates.values())))
    for name, values in rates.items():
        ended = median(each['ended'] for each in values)
        lost = losses.get(name, {})
        cells = [
            f'{median(each["accepted"] for each in values):.0f}',
            f'{ended:.0f}',
            f'{ours / ended:.2f} x',
            'yes' if CONTENDERS[name].is_durable else 'no',
        ]
        if isinstance(lost, dict):
            cells += [
                f'{lost["kills"]} ({lost["servers"]})' if lost else '-',
                f'{lost["lost"]}/{lost["jobs"]}' if lost else '-',
                str(lost.get('twice', '-')),
            ]
        else:
            cells += [lost]
        write(f'{name:<32}' + ''.join(f'{cell:>12}' for cell in cells) + '\n')
    for name, reason in missing.items():
        write(f'{name:<32}  not measured: {reason}\n')
