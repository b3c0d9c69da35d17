# SPDX-License-Identifier: ZPL-2.1
"""Every code block of README.rst and of the documentation is run as a test."""

import doctest
import subprocess
from pathlib import Path

from sybil import Sybil
from sybil.parsers.rest import CodeBlockParser, DocTestParser, PythonCodeBlockParser, SkipParser
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent


def check_commands(example):
    """Check that make has the targets which a console block shows."""
    for line in example.parsed.splitlines():
        prompt, command, *arguments = line.split()
        assert prompt == '$', line
        if command == 'make':
            subprocess.run(
                ['make', '--dry-run', *arguments], cwd=ROOT, check=True, capture_output=True
            )


def give_a_module(namespace):
    """Let the code of a page belong to a module, which Pyramid looks for."""
    namespace['__name__'] = __name__


class Scheduling(LoadScopeScheduling):
    """Distribution of pytest-xdist: the examples of a page in their order, other tests anyhow."""

    def _split_scope(self, nodeid):
        path = nodeid.partition('::')[0]
        return path if path.endswith('.rst') else nodeid


def pytest_xdist_make_scheduler(config, log):
    """Give pytest-xdist its distribution."""
    return Scheduling(config, log)


pytest_collect_file = Sybil(
    parsers=[
        SkipParser(),  # a test of its own runs what is skipped
        DocTestParser(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE),
        PythonCodeBlockParser(),
        CodeBlockParser('console', check_commands),
    ],
    setup=give_a_module,
    path=str(ROOT),
    patterns=['README.rst', 'docs/*.rst', 'docs/howto/*.rst'],
).pytest()
