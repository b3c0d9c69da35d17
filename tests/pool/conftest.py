# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of pools."""

from functools import partial

import pytest
import zmq
import zmq.auth

from job_checks import Asker
from job_handlers import JobPool, Jobs
from pool_handlers import Pool


@pytest.fixture
def pool(start):
    """Start a pool of two workers."""
    return partial(start, factory=Pool)


@pytest.fixture
def keys(tmp_path):
    """Keys of a broker and of a worker."""
    folder = tmp_path / 'keys'
    (folder / 'workers').mkdir(parents=True)
    zmq.auth.create_certificates(folder, 'broker')
    zmq.auth.create_certificates(folder, 'stranger')
    zmq.auth.create_certificates(folder / 'workers', 'worker')
    return folder


@pytest.fixture
def job_pool(start, tmp_path):
    """Start a pool with a journal; a keyword is an attribute of the pool, or an argument."""

    def start_pool(handler=Jobs, address='127.0.0.1:0', **options):
        options = {'journal': tmp_path / 'x.jobs', **options}
        attributes = {name: options.pop(name) for name in list(options) if hasattr(JobPool, name)}
        factory = type('OwnPool', (JobPool,), attributes)
        return start(address, handler, factory=factory, **{'workers': 2, **options})

    return start_pool


@pytest.fixture
def asker(job_pool):
    """Return a client of a pool with a journal."""
    with Asker(job_pool()) as asker:
        yield asker
