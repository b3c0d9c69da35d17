# SPDX-License-Identifier: ZPL-2.1
"""Loops that are closed while messages are on their way, in programs that libzmq could abort."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

import loop_ends
from loop_ends import VARIANTS

ROUNDS = 4
"""Rounds in the usual tests"""

MANY_ROUNDS = 100
"""Rounds beside other programs that compute"""


def run(variant, rounds, timeout):
    """Run the program; an assertion of libzmq that fails is in its standard error."""
    command = [sys.executable, loop_ends.__file__, variant, str(rounds)]
    program = subprocess.run(command, stderr=subprocess.PIPE, timeout=timeout, check=False)
    assert program.returncode == 0, program.stderr.decode()


@contextmanager
def load():
    """Run two programs that compute."""
    programs = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(2)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.parametrize('variant', VARIANTS)
def test_end(variant):
    run(variant, ROUNDS, 100)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize('variant', VARIANTS)
def test_end_under_load(variant):
    with load():
        run(variant, MANY_ROUNDS, 900)
