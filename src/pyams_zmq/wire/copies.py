# SPDX-License-Identifier: ZPL-2.1
"""Copies of values that msgspec can encode while other threads change the originals.

msgspec keeps a pointer to the items of a list while it calls its hook. Python code runs there, so
that another thread may change the list; then msgspec would read memory that was freed.
"""

from collections.abc import Iterable
from copy import copy
from typing import Any

import msgspec

_USUAL = frozenset({str, int, float, bool, type(None)})


class NeedsCopyError(Exception):
    """A value cannot be encoded without a hook."""


def need_copy(_value: Any) -> Any:
    """Raise a NeedsCopyError, as a hook of msgspec."""
    raise NeedsCopyError


def copy_containers(value: Any) -> Any:
    """Return a value with the same JSON form whose lists and the like are copies."""
    if isinstance(value, dict):
        return {
            key: item if type(item) in _USUAL else copy_containers(item)
            for key, item in dict.copy(value).items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [item if type(item) in _USUAL else copy_containers(item) for item in list(value)]
    if isinstance(value, msgspec.Struct):
        changed = copy(value)
        for name in changed.__struct_fields__:
            msgspec.structs.force_setattr(changed, name, copy_containers(getattr(value, name)))
        return changed
    cls = type(value)
    if hasattr(cls, '__dataclass_fields__'):
        return _copy_instance(value, cls.__dataclass_fields__)
    if hasattr(cls, '__attrs_attrs__'):
        return _copy_instance(value, [each.name for each in cls.__attrs_attrs__])
    return value


def _copy_instance(value: Any, names: Iterable[str]) -> Any:
    """Return a copy of an instance of a dataclass or attrs class, without calling its methods."""
    try:
        changed = object.__new__(type(value))
    except TypeError:  # derived from a class in C
        return value
    attributes = dict(getattr(value, '__dict__', ()))  # attrs classes may have more than fields
    attributes.update({name: getattr(value, name) for name in names if hasattr(value, name)})
    for name, item in attributes.items():
        object.__setattr__(changed, name, copy_containers(item))
    return changed
