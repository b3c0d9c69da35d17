#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""Every code block of README.rst and of the documentation is run as a test."""

import doctest
import subprocess
from pathlib import Path

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
