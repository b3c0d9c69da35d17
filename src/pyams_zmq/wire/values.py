# SPDX-License-Identifier: ZPL-2.1
"""The JSON form of values: what :mod:`msgspec` encodes itself, and what an application adds.

The encoders belong to the program, not to a Pyramid registry: clients, processes and transactions
of all its applications use them, and a process has those that were added before it was started.
"""

import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, EnumMeta
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from pyams_zmq.wire.copies import copy_containers


class _Encoder(NamedTuple):
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any] | None


class _Encoders:
    """The encoders by type. It imports zope.interface, which most clients do not need, if used."""

    def __init__(self) -> None:
        from zope.interface import Interface, providedBy  # noqa: PLC0415 - as above
        from zope.interface.adapter import AdapterRegistry  # noqa: PLC0415 - as above

        self._provided, self._specify = Interface, providedBy
        self._registry: Any = AdapterRegistry()

    def add(self, type: Any, encoder: _Encoder) -> None:  # noqa: A002 - as in `add_encoder`
        self._registry.register([_key_of(type)], self._provided, '', encoder)

    def get(self, type: Any) -> _Encoder | None:  # noqa: A002 - as above
        """Return the encoder of exactly this type."""
        found: _Encoder | None = self._registry.registered([_key_of(type)], self._provided)
        return found

    def find(self, value: Any) -> _Encoder | None:
        """Return the encoder of the class of a value, of a base, or of an interface of it."""
        found: _Encoder | None = self._registry.lookup([self._specify(value)], self._provided)
        return found


_encoders: _Encoders | None = None  # until the first one is added


# The constructors are defaults because freezegun replaces the classes in this module, too.
def _to_datetime(value: datetime, combine: Callable[..., datetime] = datetime.combine) -> datetime:
    return combine(value.date(), value.timetz())


def _to_date(value: date, make: Callable[[int], date] = date.fromordinal) -> date:
    return make(value.toordinal())


# msgspec encodes instances of these types, but not of their subclasses.
_SCALARS: dict[type, Callable[[Any], Any]] = {
    str: str.__str__,
    int: int.__int__,
    float: float.__float__,
    bytes: bytes,
    bytearray: bytes,
    Decimal: Decimal,
    datetime: _to_datetime,
    date: _to_date,
    time: lambda value: time(
        value.hour, value.minute, value.second, value.microsecond, value.tzinfo, fold=value.fold
    ),
    timedelta: timedelta.__pos__,
    Enum: lambda value: value.value,  # of another metaclass than EnumMeta
}
_FAMILIES = (dict, list, tuple, set, frozenset, UUID, msgspec.Struct)
_NATIVE = {*_SCALARS, bool, type(None), memoryview, msgspec.Raw}
# msgspec encodes these itself, except as keys of a dictionary.
_KEYS = {None: 'null', True: 'true', False: 'false'}
_MAX_NAME = 40  # characters of a name in an error


def add_encoder(
    type: Any,  # noqa: A002 - the name of the argument in the documentation
    encoder: Callable[[Any], Any],
    decoder: Callable[[Any], Any] | None = None,
) -> None:
    """Add the JSON form of a type, for all messages and replies of this program.

    It replaces an earlier one of the same type. A process that has started already does not get it.

    :param type: class or interface; subclasses use the encoder as well
    :param encoder: function of a value that returns any value with a JSON form
    :param decoder: function of the decoded JSON form that returns the value, for parameters of
        methods that are annotated with exactly this *type*; the text of a ValueError that it raises
        is sent to the caller
    :raises TypeError: if *type* is not a class or interface, or a function is not callable
    :raises ValueError: if msgspec encodes instances of *type* itself
    """
    check_encoder(type, encoder, decoder)
    global _encoders  # noqa: PLW0603 - see there
    if _encoders is None:
        _encoders = _Encoders()
    _encoders.add(type, _Encoder(encoder, decoder))


def check_encoder(type: Any, encoder: Any, decoder: Any = None) -> None:  # noqa: A002 - as above
    """Check the arguments of `add_encoder`.

    :raises TypeError, ValueError: those of `add_encoder`
    """
    is_class = _is_class(type)
    if not is_class and not _is_interface(type):
        raise TypeError(f'Bad type {type!r}: write a class or an interface')
    for function in (encoder, encoder if decoder is None else decoder):
        if not callable(function):
            raise TypeError(f'Bad encoder or decoder {function!r} of {type!r}: write a function')
    if is_class and _is_native(type):
        raise ValueError(
            f'{type!r} cannot have an encoder: its instances are encoded already, without calling '
            'one; return another value instead, or encode another class'
        )


def find_decoder(type: Any) -> Callable[[Any], Any] | None:  # noqa: A002 - as above
    """Return the decoder of exactly this class or interface, or None."""
    encoder = None if _encoders is None else _encoders.get(type)
    return None if encoder is None else encoder.decode


def _is_class(value: Any) -> bool:
    """Return True for a class; in Python 3.10 `list[int]` is an instance of `type`, too."""
    return isinstance(value, type) and not hasattr(value, '__origin__')


def _is_interface(value: Any) -> bool:
    from zope.interface.interfaces import IInterface  # noqa: PLC0415 - see `_Encoders`

    return bool(IInterface.providedBy(value))


def _key_of(type: Any) -> Any:  # noqa: A002 - as above
    if _is_class(type):
        from zope.interface import implementedBy  # noqa: PLC0415 - see `_Encoders`

        return implementedBy(type)  # type: ignore[no-untyped-call] # zope.interface has no types
    return type


def _is_native(cls: type) -> bool:
    """Return True if msgspec encodes the instances of a class without calling its hook."""
    return (
        cls in _NATIVE
        or issubclass(cls, _FAMILIES)
        or type(cls) is EnumMeta
        or is_dataclass(cls)
        or '__attrs_attrs__' in vars(cls)
    )


class _NoJSONError(TypeError):
    """A value without a JSON form; `explain` replaces it, because it keeps the value."""

    def __init__(self, value: Any, text: str):
        super().__init__(text)
        self.value = value


def to_json(value: Any) -> Any:
    """Return the JSON form of a value that msgspec does not encode itself, as its hook.

    :raises TypeError: if it has none, or if its encoder fails
    """
    return copy_containers(_find_json(value))


def _find_json(value: Any) -> Any:
    kind = type(value)
    if value is None or kind is bool:
        return _KEYS[value]
    what = f'encoder of {kind.__qualname__}'
    try:
        # As in the JSON renderer of Pyramid; a str and a number have a JSON form without it.
        if not isinstance(value, (str, int, float, type)) and hasattr(value, '__json__'):
            what = f'method __json__ of {kind.__qualname__}'
            return value.__json__(_current_request())
        encoder = None if _encoders is None else _encoders.find(value)
        if encoder is not None:
            return encoder.encode(value)
        for base in kind.__mro__:
            if base in _SCALARS:
                return _SCALARS[base](value)
    except RecursionError:
        raise
    except Exception as error:
        raise _NoJSONError(value, f'The {what} has raised {type(error).__name__}') from error
    if kind in _FAMILIES:
        raise _NoJSONError(value, f'A key of type {kind.__qualname__} has no JSON form')
    raise _NoJSONError(
        value,
        f'{kind.__qualname__} has no JSON form: give the class a method `__json__(request)`, or '
        'register an encoder with `add_zmq_encoder`',
    )


def _current_request() -> Any:
    """Return the Pyramid request of this thread, or None."""
    pyramid: Any = sys.modules.get('pyramid.threadlocal')
    return None if pyramid is None else pyramid.get_current_request()


def explain(error: Exception, value: Any) -> Exception:
    """Return an error of msgspec, or of its hook, with the place in the value that it is about.

    The text contains types and names of fields, and no other part of the value.

    :param error: what msgspec has raised when it encoded *value*
    """
    if isinstance(error, _NoJSONError):
        return TypeError(f'{error}{_locate(value, lambda item: item is error.value)}')
    if isinstance(error, UnicodeEncodeError):
        text = 'A string with a lone surrogate has no JSON form'
        return ValueError(f'{text}{_locate(value, _has_surrogate)}')
    if isinstance(error, BufferError):
        return TypeError('A memoryview that is not contiguous has no JSON form')
    return error


def _has_surrogate(value: Any) -> bool:
    try:
        if isinstance(value, str):
            str.encode(value)
    except UnicodeEncodeError:
        return True
    return False


def _locate(value: Any, matches: Callable[[Any], bool]) -> str:
    """Return the path of the first item that matches, for the end of a text; empty if none does."""
    stack = [('$', value)]
    seen = set()
    while stack:
        path, item = stack.pop()
        if matches(item):
            return f' (at {path})'
        if id(item) not in seen and isinstance(item, (dict, list, tuple)):
            seen.add(id(item))
            if isinstance(item, dict):
                for key in item:
                    if matches(key):
                        return f' (a key of {path})'
                items = [(f'{path}{_name(key)}', each) for key, each in item.items()]
            else:
                items = [(f'{path}[{number}]', each) for number, each in enumerate(item)]
            stack.extend(reversed(items))
    return ''


def _name(key: Any) -> str:
    """Return a key for a path if it is the name of a field; others may be secret."""
    is_name = isinstance(key, str) and key.isidentifier() and len(key) <= _MAX_NAME
    return f'.{key}' if is_name else '[...]'
