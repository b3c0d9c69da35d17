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


"""PyAMS_zmq.pytest_plugin module: the fixture that pytest finds when this package is installed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

__docformat__ = 'restructuredtext'


@pytest.fixture
def zmq_running() -> Iterator[Callable[..., Any]]:
    """Start processes that stop with the test: what `pyams_zmq.testing.running` takes."""
    # Every run of pytest in this environment loads this module: it imports no more than it must.
    from pyams_zmq.testing import running  # noqa: PLC0415

    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(running(*args, **kwargs))
