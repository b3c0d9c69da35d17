# SPDX-License-Identifier: ZPL-2.1
"""What must hold after a soak; each check returns the problems as texts.

A token is ``TYPE/CLIENT/STREAM/NUMBER``. The messages of a stream are sent one after the other; a
number such as 2.1 is a part of the second turn.
"""

import re
from collections import Counter
from statistics import median
from typing import NamedTuple

MARGIN = 5.0
"""Seconds that a call may take beyond its time-out: its client is stopped, the machine is busy"""

GOOD_ENDS = {
    'call': {'ok', '502', '503', '504', 'timeout', 'unreachable'},
    'send': {'accepted', 'unreachable', 'aborted'},
}
"""Documented ends of calls and messages"""

REFUSED = '503'
"""End of a call without a fault: the load fills queues, and has methods that take too long"""

NOT_RUN = {'call': {REFUSED}, 'send': {'unreachable', 'aborted'}}
"""Ends that say that the method was not called"""

UNORDERED = {'pool'}
"""Services that begin several messages of a client at the same time"""

SLACK = 1.0
"""Seconds between an event and its time in the journals, in which it may be on either side"""

RECOVERY = 5.0
"""Seconds after a fault in which a call may still fail"""

MIN_LIFE = 60
"""Samples of a process, one a second, from which its growth is judged"""

GROWTH = {'KiB': (16 * 1024, 0.1), 'descriptors': (16, 0.1)}
"""Growth that a process may have: a number, or a part of the former value if that is more"""

BAD_LINES = re.compile(
    r'Assertion failed|exit code -6\b|CRITICAL|Traceback|Fatal Python error|Too many open'
)
"""Lines of a log that tell a fault of the product"""

UNKNOWN = 20.0
"""Seconds that a message of a client may be under way, if the client was killed with its record"""

_SENDS = re.compile(r'/(send|commit)-|/flood$')
_LOSS = re.compile(
    r'^(\d+\.\d+) .*?(?:(\d+) messages|Message) .* to (\S+): (.*?)(?: \((\d+) times\))?$',
    re.MULTILINE,
)


class Run(NamedTuple):
    """A line of the journal of a service: a method was called."""

    time: float
    pid: int
    token: str


class Told(NamedTuple):
    """A line of the record of a client, see `load.Call`."""

    time: float
    kind: str
    route: str
    token: str
    end: str
    seconds: float


class Loss(NamedTuple):
    """Messages that a client has logged as lost."""

    time: float
    address: str
    reason: str
    times: int


class Interruption(NamedTuple):
    """Seconds in which a fault disturbed a target.

    :ivar loses: true if messages under way may be lost
    """

    target: str
    begin: float
    end: float
    loses: bool


def stream_of(token):
    """Return the stream of a token, and its place in it."""
    stream, _, number = token.rpartition('/')
    return stream, tuple(map(int, number.split('.')))


def read_runs(text):
    """Read the journal of a service."""
    lines = map(str.split, text.splitlines())
    return [Run(float(time), int(pid), token) for time, pid, token in lines]


def read_told(text):
    """Read the record of a client."""
    lines = map(str.split, text.splitlines())
    return [Told(float(time), *words, float(seconds)) for time, *words, seconds in lines]


def read_losses(text):
    """Read the messages that a client has logged as lost."""
    return [
        Loss(float(time), address, reason, int(number or times or 1))
        for time, number, address, reason, times in _LOSS.findall(text)
    ]


def disturbed(interruptions, targets, begin, end):
    """Return True if one of these targets was disturbed between two times."""
    return any(
        item.target in targets and begin - SLACK <= item.end and item.begin <= end + SLACK
        for item in interruptions
    )


def losing(interruptions):
    """Return those in which messages under way may be lost."""
    return [item for item in interruptions if item.loses]


def check_ends(told, timeout):
    """Check that each call ends in its reply or in a documented way, and in time."""
    for each in told:
        if each.end not in GOOD_ENDS[each.kind]:
            yield f'{each.token} to {each.route} ended with {each.end}'
        if each.seconds > timeout + MARGIN:
            yield f'{each.token} to {each.route} took {each.seconds} s'


def check_failures(told, paths, interruptions):
    """Check that each call without its reply met a fault on its way.

    :param paths: targets of faults on the way of a route
    """
    for each in told:
        expected = '504' if each.token.startswith('late/') else 'ok'
        if each.kind != 'call' or each.end in (expected, REFUSED):
            continue
        seconds = each.time - RECOVERY, each.time + each.seconds
        if not disturbed(interruptions, paths[each.route], *seconds):
            yield f'{each.token} to {each.route} ended with {each.end} without a fault'


def check_runs(told, runs):
    """Check that what has a reply was run, that what was refused was not, and nothing ran twice."""
    counts = Counter(run.token for each in runs.values() for run in each)
    for each in told:
        if each.end in NOT_RUN[each.kind] and counts[each.token]:
            yield f'{each.token} to {each.route} ended with {each.end}, but was run'
        if each.end == 'ok' and not counts[each.token]:
            yield f'{each.token} to {each.route} has a reply, but was not run'
    for token, count in counts.items():
        if count > 1 and not token.startswith('again/'):
            yield f'{token} was run {count} times'


def check_order(told, runs, paths, interruptions):
    """Check that the messages of a stream run in their order.

    What was at risk may run late, when its successors have come through another connection.
    """
    sent = {each.token: each for each in told}
    for service in set(runs) - UNORDERED:
        latest = {}
        for run in runs[service]:
            stream, number = stream_of(run.token)
            if not _SENDS.search(stream):
                continue
            if number > latest.get(stream, ()):
                latest[stream] = number
                continue
            each = sent.get(run.token)
            begin = run.time - UNKNOWN if each is None else each.time
            targets = paths[service if each is None else each.route]
            if not disturbed(losing(interruptions), targets, begin, run.time):
                yield f'{stream} in {service}: {number} ran after {latest[stream]}'


def find_lost(told, runs, paths, interruptions):
    """Find accepted messages that have not run.

    They may be lost if an interruption of their path came after they were sent and before a later
    message of their stream ran: then they were under way.

    :param paths: targets of faults on the way of a route
    :return: messages that an interruption explains, and messages that none does
    """
    ran = {run.token: run.time for each in runs.values() for run in each}
    at_risk, lost = [], []
    next_run = {}
    for each in sorted(told, key=lambda item: stream_of(item.token), reverse=True):
        stream, _number = stream_of(each.token)
        if each.token in ran:
            next_run[stream] = ran[each.token]
        elif each.end == 'accepted':
            until = next_run.get(stream, float('inf'))
            was_at_risk = disturbed(losing(interruptions), paths[each.route], each.time, until)
            (at_risk if was_at_risk else lost).append(each)
    return at_risk, lost


def check_losses(at_risk, losses, addresses):
    """Check that the client has logged each message that was lost.

    :param at_risk: messages of one client that have not run
    :param losses: what it has logged
    :param addresses: address of each route
    """
    logged = Counter()
    for loss in losses:
        logged[loss.address] += loss.times
    missing = Counter(each.route for each in at_risk)
    for route, count in missing.items():
        known = logged[addresses[route]]
        if count > known:
            yield f'{count} messages to {route} were lost, {known} are in the log'


def check_growth(name, unit, samples):
    """Check that the values of a process do not grow, apart from its start.

    :param samples: values, one each second
    """
    if len(samples) < MIN_LIFE:
        return
    fifth = len(samples) // 5
    first, last = median(samples[fifth : 2 * fifth]), median(samples[-fifth:])
    fixed, part = GROWTH[unit]
    if last - first > max(fixed, part * first):
        yield f'{name} grew from {first:.0f} to {last:.0f} {unit}'


def check_log(name, text):
    """Check that a log has none of `BAD_LINES`."""
    for line in text.splitlines():
        if BAD_LINES.search(line):
            yield f'{name}: {line}'
