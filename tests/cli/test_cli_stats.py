# SPDX-License-Identifier: ZPL-2.1
"""`pyams_zmq stats` and `pyams_zmq methods`."""

import json

import pytest

WORKER = {
    'pid': 12,
    'host': 'h',
    'state': 'busy',
    'age': 7200.5,
    'memory': 85.4,
    'calls': 7,
    'in_flight': 1,
    'slots': 4,
}

STATS = {
    'kind': 'pool',
    'version': '3.0.0',
    'pid': 11,
    'host': 'h',
    'uptime': 3 * 86400.0,
    'state': 'draining',
    'memory': 40.6,
    'calls': 9,
    'errors': 1,
    'refused': 2,
    'repeated': 3,
    'lost': 4,
    'in_flight': 5,
    'queue': 6,
    'queue_bytes': 700,
    'queue_limit': 1000,
    'oldest': 12.34,
    'methods': {
        'probe': {'calls': 1, 'errors': 0, 'mean': 1e-4},
        'convert': {
            'calls': 8,
            'errors': 1,
            'mean': 0.5,
            'max': 2.0,
            'p50': 0.4,
            'p90': 0.9,
            'p99': 1.5,
        },
    },
    'workers': [WORKER],
    'jobs': {'states': {'queued': 3, 'done': 10}, 'in_hand': 1, 'watchers': 0, 'problem': ''},
}

TEXT = """\
: pool, draining, started 3 d ago, pid 11 on h, pyams_zmq 3.0.0
9 calls, 1 errors, 2 refused, 3 repeated, 4 lost
5 in hand, 6 of 1000 waiting (700 bytes), the oldest for 12.3 s
41 MiB of memory
jobs: 3 queued, 10 done

METHOD   CALLS  ERRORS  MEAN      P50       P90       P99    MAX
convert  8      1       500.0 ms  400.0 ms  900.0 ms  1.5 s  2.0 s
probe    1      0       0.1 ms    ?         ?         ?      ?

WORKER  HOST  STATE  AGE  MEMORY  CALLS  IN HAND
12      h     busy   2 h  85 MiB  7      1 of 4
"""

EMPTY = """\
: service, up, started ? ago, pid ? on ?, pyams_zmq ?
? calls, ? errors, ? refused, ? repeated, ? lost
? in hand, ? waiting (? bytes), the oldest for ?
? MiB of memory
"""

BAD_WORKER = """
WORKER  HOST  STATE  AGE  MEMORY  CALLS  IN HAND
?       ?     ?      ?    ? MiB   ?      ? of ?
"""

METHODS = {
    'convert': {
        'signature': '(path, size: int = 5)',
        'doc': 'Convert a film.',
        'timeout': 60,
        'kind': 'job',
        'repeatable': True,
    },
    'animate': {
        'signature': '(path)',
        'doc': '\x1b[2J',
        'timeout': None,
        'kind': 'call',
        'repeatable': False,
    },
    'zoom': None,
}


def test_stats(run, answer):
    target = answer(stats=[200, STATS])
    code, out, err = run('stats', *target)
    assert (code, err) == (0, '')
    assert out == target[1] + TEXT
    code, out, err = run('stats', *target, '--json')
    assert (code, err) == (0, '')
    assert json.loads(out) == {**STATS, 'outbox': None}


@pytest.mark.parametrize(
    ('stats', 'text'),
    [
        ({}, EMPTY),
        ({'queue_limit': None, 'jobs': None, 'methods': [], 'workers': {}}, EMPTY),
        ({'workers': [5]}, EMPTY + BAD_WORKER),
        ({'calls': 'x', 'errors': 1e300, 'uptime': [], 'oldest': None}, EMPTY),
        ({'host': '\x1b[2J'}, EMPTY.replace('on ?', 'on ?[2J')),
        ({'jobs': {'states': {}, 'problem': ''}}, f'{EMPTY}jobs: none\n'),
        (
            {'jobs': {'problem': 'the disk is full'}},
            f'{EMPTY}jobs: none\nthe journal of jobs: the disk is full\n',
        ),
    ],
)
def test_statistics_of_another_version(run, answer, stats, text):
    target = answer(stats=[200, stats])
    assert run('stats', *target) == (0, target[1] + text, '')


def test_methods(run, answer):
    target = answer(methods=[200, METHODS])
    assert run('methods', *target) == (
        0,
        'METHOD                        KIND             TIMEOUT  DESCRIPTION\n'
        'animate(path)                 call                      ?[2J\n'
        'convert(path, size: int = 5)  job, repeatable  60 s     Convert a film.\n'
        'zoom\n',
        '',
    )
    code, out, err = run('methods', *target, '--json')
    assert (code, err) == (0, '')
    assert json.loads(out) == METHODS
    assert run('methods', *answer(methods=[200, {}])).out == 'METHOD  KIND  TIMEOUT  DESCRIPTION\n'
