# SPDX-License-Identifier: ZPL-2.1
"""Send every class of malformed message to one process; count the replies and their status.

The messages and the expected replies are those of `tests/support/messages.py`. Several clients send
them at the same time in random orders. The memory and descriptors of the process are compared with
those after the first round.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

import zmq

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tests/support'))

from handlers import LoggedProcess
from messages import MESSAGES, Dealer, call

CLIENTS = 4
ROW = '{:<13} {:<38} {:>7} {:>9}  {}'


def describe(reply):
    """Return the text for a reply in the table."""
    match reply:
        case [int(status), _]:
            return str(status)
    return json.dumps(reply)[:20]


def send_round(dealers, rng, answers):
    """Send all messages once from each client; count the replies."""
    orders = [rng.sample(MESSAGES, len(MESSAGES)) for _ in dealers]
    for cases in zip(*orders, strict=True):
        for dealer, case in zip(dealers, cases, strict=True):
            dealer.send(case.frames)
    for dealer, order in zip(dealers, orders, strict=True):
        for case in order:
            _envelope, reply = dealer.receive()
            answers[case.group, case.name, describe(reply)] += 1
        if dealer.ask(call('echo')) != [([b''], [200, None])]:
            sys.exit('A message got more than one reply, or a valid message got none')


def measure(dealer, kind):
    """Return a number that the process measures."""
    ((_envelope, (_status, value)),) = dealer.ask(call(kind))
    return value


def print_table(answers, sent):
    """Print one row for each message and status."""
    print(ROW.format('class', 'message', 'sent', 'answered', 'status'))
    for case in MESSAGES:
        got = {
            status: number
            for (group, name, status), number in answers.items()
            if (group, name) == (case.group, case.name)
        }
        for status, number in got.items():
            print(ROW.format(case.group, case.name, sent, number, status))


def main():
    """Run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=50, help='rounds after the first one')
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        process = LoggedProcess(Path(folder) / 'log')
        process.start()
        try:
            process.wait_ready()
            dealers = [Dealer(context, process.bound_address) for _ in range(CLIENTS)]
            rng = random.Random(20)  # noqa: S311 - the same order each time
            send_round(dealers, rng, Counter())
            rss, fds = measure(dealers[0], 'trimmed_rss'), measure(dealers[0], 'fds')
            answers, start = Counter(), perf_counter()
            for _ in range(rounds):
                send_round(dealers, rng, answers)
            seconds = perf_counter() - start
            rss, now = measure(dealers[0], 'trimmed_rss') - rss, measure(dealers[0], 'fds')
            context.destroy(0)
        finally:
            process.stop()
    print_table(answers, rounds * CLIENTS)
    sent = rounds * CLIENTS * len(MESSAGES)
    print(f'{sent} messages, {answers.total()} answered, in {seconds:.1f} s', end='; ')
    print(f'memory {rss:+d} KiB, descriptors {now - fds:+d}')


if __name__ == '__main__':
    main()
