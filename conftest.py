# SPDX-License-Identifier: ZPL-2.1
"""Every code block of README.rst and of the documentation is run as a test."""

import doctest
import subprocess
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.rest import CodeBlockParser, DocTestParser, PythonCodeBlockParser, SkipParser

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Run the examples of a page in their order, in one process of pytest-xdist."""
    for item in items:
        if item.path.suffix == '.rst':
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


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
