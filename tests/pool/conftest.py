# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of pools."""

from functools import partial

import pytest
import zmq
import zmq.auth

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
