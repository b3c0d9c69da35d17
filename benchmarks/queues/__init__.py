# SPDX-License-Identifier: ZPL-2.1
"""The contenders of `jobs.py`: queues of jobs, their workers and the services that they need."""

from typing import NamedTuple

OURS = 'ours'
QUEUES = 'queues'
"""The environment of the others"""

ALWAYS, EVERYSEC = 'always', 'everysec'
"""When redis waits for the disk: before each reply, or once a second"""


class Contender(NamedTuple):
    """A queue of jobs.

    :ivar module: module in this package, see :mod:`queues.work`
    :ivar command: starts the workers; `{module}` is its full name, `{bin}` the folder of programs
    :ivar redis: when its redis waits for the disk; None if it has none
    :ivar is_durable: true if an accepted job is on disk
    """

    name: str
    environment: str
    module: str
    command: str
    is_durable: bool = True
    redis: str | None = None


_HUEY = '{bin}/huey_consumer {module}.app -w 4 -k process -q -d 0.01 -m 0.05 -c 1 -n'
_RQ = '{bin}/rq worker-pool -n 4 -q -u unix://{folder}/redis.sock'
_DRAMATIQ = '{bin}/dramatiq {module} --processes 4 --threads 1 --skip-logging'
_CELERY = '{bin}/celery -q -A {module} worker -c 4 -l ERROR --without-gossip --without-mingle'

CONTENDERS = {
    each.name: each
    for each in (
        Contender('pyams_zmq', OURS, 'ours', '{python} -m {module}'),
        Contender('huey, sqlite', QUEUES, 'over_huey', _HUEY),
        Contender('huey, sqlite, fsync=False', QUEUES, 'over_huey_fast', _HUEY, is_durable=False),
        *(
            Contender(f'{name}, redis {mode}', QUEUES, module, command, mode == ALWAYS, mode)
            for name, module, command in (
                ('rq', 'over_rq', _RQ),
                ('dramatiq', 'over_dramatiq', _DRAMATIQ),
                ('Celery', 'over_celery', _CELERY),
            )
            for mode in (ALWAYS, EVERYSEC)
        ),
        Contender(
            'Celery, acks_late, redis always', QUEUES, 'over_celery_late', _CELERY, True, ALWAYS
        ),
    )
}
