# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of applications."""

import pytest

from app.program import WebServer
from checks import TIMEOUT, wait_until


@pytest.fixture
def serve(run_program, tmp_path):
    """Start servers, `serve('pserve', '--reload')`; at the end kill those that still run."""

    def start(name, *args, **settings):
        settings.setdefault('address', f'ipc://{tmp_path}/zmq.sock')
        server = run_program(*args, factory=getattr(WebServer, name), **settings)
        server.wait_for_service()
        if name == 'gunicorn' and '--workers' in args:
            count = int(args[args.index('--workers') + 1])
            wait_until(lambda: len(server.workers()) == count, TIMEOUT)
        return server

    return start
