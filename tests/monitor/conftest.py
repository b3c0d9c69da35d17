# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of the monitor."""

from contextlib import ExitStack

import pytest

from watched_services import Services


@pytest.fixture
def services(tmp_path):
    """Return the services of an application; stop them at the end."""
    with ExitStack() as stack:
        yield Services(tmp_path, stack)
