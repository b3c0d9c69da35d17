# SPDX-License-Identifier: ZPL-2.1
"""Journals in a folder of the test."""

import pytest

from journals import Bench


@pytest.fixture
def path(tmp_path):
    """Path of a journal, which does not exist."""
    return tmp_path / 'converter.jobs'


@pytest.fixture
def bench(path):
    """Return a journal with a clock."""
    bench = Bench(path)
    yield bench
    bench.close()
