# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of pools."""

import os
from functools import partial

import pytest
import zmq
import zmq.auth

from pool_handlers import Pool
from pyams_zmq.process import lock as lock_module


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Folder of private folders."""
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(lock_module.tempfile, 'tempdir', str(tmp_path / 'tmp'))
    return tmp_path / 'tmp' / f'pyams_zmq-{os.geteuid()}'


@pytest.fixture
def pool(start, folder):
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
