# SPDX-License-Identifier: ZPL-2.1
"""Evaluation of a run: ratios, goals, tables, and the comparison of two runs.

A run is saved as JSON: the machine, the missing contenders, and the cells. A cell is a message size
and a number of clients; it has the rates of each contender, one for each round, and the seconds of
processor time of a call in clients and server.
"""

from statistics import median
from typing import NamedTuple

from contenders import (
    AIOZMQ_PIPELINED,
    ASYNC_PIPELINED,
    BARE,
    BARE_PIPELINED,
    CLIENT,
    CONCURRENT,
    CONTENDERS,
    SERIAL,
    SOCKETS,
    VERSION_2_SOCKETS,
)

NOTHING = '-'


class Goal(NamedTuple):
    """A minimum for a ratio.

    :ivar name: contender
    :ivar least: minimum of the ratio
    :ivar over: contender to compare with
    :ivar clients: number of clients
    """

    name: str
    least: float
    over: str = BARE
    clients: int = 1
    payload: int = 60


GOALS = (
    Goal(CLIENT, 1.15),
    Goal(SERIAL, 0.95),
    Goal(SERIAL, 1.0, clients=8),
    Goal(SOCKETS, 1.4, over=VERSION_2_SOCKETS),
    Goal(ASYNC_PIPELINED, 0.6, over=BARE_PIPELINED),
    Goal(ASYNC_PIPELINED, 4, over=AIOZMQ_PIPELINED),
    Goal(CONCURRENT, 0.6),
    Goal(CONCURRENT, 0.6, clients=8),
)


def ratio(rates, name, over=BARE):
    """Return the median of the ratios within a round; None if one of both was not measured.

    :param rates: rates of each contender
    """
    values, others = rates.get(name), rates.get(over)
    if not values or not others:
        return None
    return median(value / other for value, other in zip(values, others, strict=True))


def judge(run, goal):
    """Return the ratio of a goal; None if it was not measured."""
    for cell in run['cells']:
        if (cell['payload'], cell['clients']) == (goal.payload, goal.clients):
            return ratio(cell['rates'], goal.name, goal.over)
    return None


def describe_goal(run, goal):
    """Return the text for a goal: reached, missed or not measured."""
    text = f'{goal.least:g}'
    if goal.clients > 1:
        text += f' with {goal.clients} clients'
    if goal.over != BARE:
        text += f' over {goal.over}'
    value = judge(run, goal)
    if value is None:
        return f'{text}: not measured'
    return f'{text}: {"reached" if value >= goal.least else "missed"} ({value:.2f})'


def describe_goals(run, name):
    """Return the text for the goals of a contender."""
    return '; '.join(describe_goal(run, goal) for goal in GOALS if goal.name == name)


def count_rounds(run):
    """Return the text for the number of rounds."""
    rounds = [len(cell['rates'].get(BARE, ())) for cell in run['cells']]
    least, most = min(rounds, default=0), max(rounds, default=0)
    return f'{most}' if least == most else f'{least} to {most}'


def name_size(size):
    """Return the text for a number of bytes."""
    for unit, factor in (('MB', 1_000_000), ('kB', 1000)):
        if size >= factor:
            return f'{size / factor:g} {unit}'
    return f'{size} B'


def make_rows(run):
    """Yield the rows of the table: header, rates of the bare pair, ratios of the others.

    The row of a missing contender has the reason instead of ratios.
    """
    cells = run['cells']
    yield [
        'ratio of calls per second',
        *(f'{name_size(cell["payload"])} x{cell["clients"]}' for cell in cells),
        'goal',
    ]
    yield [
        f'{BARE}, calls per second',
        *(_write(cell['rates'].get(BARE), lambda rates: f'{median(rates):.0f}') for cell in cells),
        '',
    ]
    for name in run['names']:
        if name in run['missing']:
            yield [name, f'not measured: {run["missing"][name]}']
        elif name != BARE:
            yield [
                name,
                *(_write_ratio(cell, name) for cell in cells),
                describe_goals(run, name),
            ]


def make_rows_of_times(run):
    """Yield the rows of a table of processor times; they depend less on the load than rates."""
    yield [
        'processor time of a call, us: client + server',
        *(f'{name_size(cell["payload"])} x{cell["clients"]}' for cell in run['cells']),
        '',
    ]
    for name in run['names']:
        if name not in run['missing']:
            yield [
                name,
                *(_write(cell['times'].get(name), _write_times) for cell in run['cells']),
                '',
            ]


def processor_time(cell, name):
    """Return the median processor time of a call in microseconds; None if it was not measured."""
    times = cell['times'].get(name)
    return median(map(sum, times)) * 1e6 if times else None


def list_failures(run):
    """Yield a line for each failure."""
    for cell in run['cells']:
        for name, text in cell['failed'].items():
            yield f'{name}, {name_size(cell["payload"])} x{cell["clients"]}: {text}'


def _write_ratio(cell, name):
    if name in cell['failed']:
        return 'failed'
    return _write(ratio(cell['rates'], name), '{:.2f}'.format)


def _write_times(times):
    return ' + '.join(f'{median(part) * 1e6:.0f}' for part in zip(*times, strict=True))


def _write(value, form):
    return NOTHING if value is None else form(value)


def print_table(rows, write):
    """Write rows as a table with aligned columns."""
    rows = list(rows)
    columns = len(rows[0])
    whole = [row for row in rows if len(row) == columns]
    widths = [max(len(row[index]) for row in whole) for index in range(columns - 1)]
    widths[0] = max(len(row[0]) for row in rows)
    for name, *rest in rows:
        parts = [name.ljust(widths[0])]
        if len(rest) == columns - 1:
            parts += [text.rjust(width) for text, width in zip(rest, widths[1:], strict=False)]
        write('  '.join([*parts, rest[-1]]).rstrip() + '\n')


def print_rst(rows, write):
    """Write rows as a reStructuredText table."""
    rows = list(rows)
    columns = len(rows[0])
    write('.. list-table::\n   :header-rows: 1\n\n')
    for row in rows:
        for index, value in enumerate(row + [''] * (columns - len(row))):
            bullet = '     -' if index else '   * -'
            write(f'{bullet} {value}'.rstrip() + '\n')


def compare(old, new):
    """Yield the rows of a table that compares two runs.

    It compares ratios, not rates: the machine or its load may differ.
    """
    nothing = {'rates': {}, 'times': {}}
    former = {(cell['payload'], cell['clients']): cell for cell in old['cells']}
    yield ['', 'ratio', 'new', 'change', 'CPU us', 'new', 'change']
    for cell in new['cells']:
        other = former.get((cell['payload'], cell['clients']), nothing)
        for name in CONTENDERS:
            ratios = ratio(other['rates'], name), ratio(cell['rates'], name)
            if ratios != (None, None):
                yield [
                    f'{name_size(cell["payload"])} x{cell["clients"]}, {name}',
                    *_write_change(ratios, '{:.2f}'),
                    *_write_change([processor_time(one, name) for one in (other, cell)], '{:.0f}'),
                ]


def _write_change(values, form):
    before, after = values
    change = f'{after / before - 1:+.0%}' if before and after else NOTHING
    return [_write(before, form.format), _write(after, form.format), change]
