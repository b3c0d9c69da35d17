# SPDX-License-Identifier: ZPL-2.1
"""State that a fork must not share with its parent: contexts, sockets, threads and locks."""

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Value = TypeVar('Value')


class ForkLocal(Generic[Value]):
    """A value that each process makes for itself, when it first needs it.

    The process id is compared at each use: a hook of `os.register_at_fork` does not run in forks
    made by uWSGI or by C code. No lock is used, because another thread may hold it at the fork.

    :param make: makes the value; it may run more than once, and then one result is used
    """

    def __init__(self, make: Callable[[], Value]):
        self._make = make
        self._values: dict[int, Value] = {}
        self._inherited: list[Any] = []

    def get(self) -> Value:
        """Return the value of this process."""
        pid = os.getpid()
        try:
            return self._values[pid]
        except KeyError:
            pass
        value = self._values.setdefault(pid, self._make())  # atomic: all threads get the same one
        for other in self._values.keys() - {pid}:
            # Kept: to delete it would close sockets and contexts that the parent uses.
            self._inherited.append(self._values.pop(other, None))
        return value


_resources: WeakSet[Any] = WeakSet()


def close_in_forks(resource: Any) -> None:
    """Let each forked child close what it has inherited; a fork made by C code does not do it.

    :param resource: an object with a method `close`, of which a weak reference is kept
    """
    _resources.add(resource)


def _close_inherited() -> None:
    for resource in _resources:
        resource.close()


os.register_at_fork(after_in_child=_close_inherited)
