# SPDX-License-Identifier: ZPL-2.1
"""The fixture that pytest finds when this package is installed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest


@pytest.fixture
def zmq_running() -> Iterator[Callable[..., Any]]:
    """Start processes that stop with the test: what `pyams_zmq.testing.running` takes."""
    # Every run of pytest in this environment loads this module: it imports no more than it must.
    from pyams_zmq.testing import running  # noqa: PLC0415

    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(running(*args, **kwargs))
