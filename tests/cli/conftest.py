# SPDX-License-Identifier: ZPL-2.1
"""Fixtures: the command line in the process of the test, and services that it asks."""

import io
import sys
from typing import NamedTuple

import pytest
from pyramid.threadlocal import manager as thread_local

from answering import AnsweringService
from pyams_zmq.cli import main

INI = '[app:main]\nuse = call:app.external:plain\n'


class Result(NamedTuple):
    """What a command has returned and written."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys, monkeypatch):
    """Run a command; return its exit code, its output and its errors."""

    def call(*argv, stdin=None):
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', ['pyams_zmq'])
            if stdin is not None:
                patch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin)))
            try:
                code = main(argv)
            except SystemExit as exit_:
                code = exit_.code
        thread_local.clear()
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def ini(tmp_path):
    """Write the ini file of an application; return its path."""

    def write(**settings):
        path = tmp_path / 'application.ini'
        lines = (f'pyams_zmq.{name} = {value}\n' for name, value in settings.items())
        path.write_text(INI + ''.join(lines))
        return str(path)

    return write


@pytest.fixture
def declare(ini):
    """Write the ini file of an application with a service; return the path, and its name."""

    def write(address, name='converter', **settings):
        given = {'start': 'never', **settings, 'address': address}
        return ini(**{f'{name}.{key}': value for key, value in given.items()}), name

    return write


@pytest.fixture
def answer():
    """Start services that answer as a test says; return the options that name their address."""
    services = []

    def start(**answers):
        services.append(AnsweringService(**answers))
        return '--address', services[-1].address

    yield start
    for service in services:
        service.close()
