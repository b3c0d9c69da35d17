# SPDX-License-Identifier: ZPL-2.1
"""Tests run in parallel: pytest-xdist can send the report of every test."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

TESTS = r"""
import logging
import pytest

def test_logs():
    logging.error('logged \ud800')

def test_fails():
    assert 'failed \ud800' == ''

def test_is_skipped():
    pytest.skip('skipped \ud800')
"""


def test_lone_surrogates_are_escaped(tmp_path):
    (tmp_path / 'test_it.py').write_text(TESTS, encoding='utf-8')
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'conftest', '-n', '1', '-rA', 'test_it.py'],
        cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert '1 failed, 1 passed, 1 skipped' in done.stdout, done.stdout + done.stderr
    for what in ('logged', 'failed', 'skipped'):
        assert rf'{what} \ud800' in done.stdout
