# SPDX-License-Identifier: ZPL-2.1
"""How the tests run: code blocks of the documentation are tests, and tests run in parallel."""

import doctest
import os
import signal
import subprocess
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.rest import CodeBlockParser, DocTestParser, PythonCodeBlockParser, SkipParser
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent


def check_commands(example):
    """Check that the make targets in a console block exist."""
    for line in example.parsed.splitlines():
        prompt, command, *arguments = line.split()
        assert prompt == '$', line
        if command == 'make':
            subprocess.run(
                ['make', '--dry-run', *arguments], cwd=ROOT, check=True, capture_output=True
            )


def set_module_name(namespace):
    """Set the module of a page's code: Pyramid looks for the module of its caller."""
    namespace['__name__'] = __name__


def pytest_configure():
    """Restore signals that `nohup` and background shells ignore: children would inherit that."""
    for num, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(num) == signal.SIG_IGN:
            signal.signal(num, handler)


class Scheduling(LoadScopeScheduling):
    """Keep the examples of a page together, in their order; distribute all other tests singly."""

    def _split_scope(self, nodeid):
        path = nodeid.partition('::')[0]
        return path if path.endswith('.rst') else nodeid


def pytest_xdist_make_scheduler(config, log):
    """Return the scheduler of pytest-xdist."""
    return Scheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers():
    """Return the number of processes for ``-n auto``: tests wait more than they compute."""
    return max(4, 3 * len(os.sched_getaffinity(0)))


def escape(value):
    """Escape the lone surrogates in a report, which the channel of pytest-xdist cannot encode."""
    if isinstance(value, str):
        return value.encode(errors='backslashreplace').decode()
    if isinstance(value, list | tuple):
        return type(value)(map(escape, value))
    if isinstance(value, dict):
        return {escape(key): escape(item) for key, item in value.items()}
    return value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """Escape the report of a test before pytest-xdist sends it."""
    return escape((yield))


pytest_collect_file = Sybil(
    parsers=[
        SkipParser(),  # a test of its own runs what is skipped
        DocTestParser(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
        PythonCodeBlockParser(),
        CodeBlockParser('console', check_commands),
    ],
    setup=set_module_name,
    path=str(ROOT),
    patterns=['README.rst', 'docs/*.rst', 'docs/howto/*.rst'],
).pytest()
