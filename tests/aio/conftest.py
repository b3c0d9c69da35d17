# SPDX-License-Identifier: ZPL-2.1
"""Fixtures of the tests of pyams_zmq.aio; `async def` tests run on each kind of loop."""

import inspect

import pytest

from aio_loops import context, run

__all__ = ['context', 'run']


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run an `async def` test with its fixture `run`."""
    if not inspect.iscoroutinefunction(pyfuncitem.function):
        return None
    names = inspect.signature(pyfuncitem.function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    arguments['run'](pyfuncitem.function(**arguments))
    return True
