# SPDX-License-Identifier: ZPL-2.1
"""The kinds of values that options have: what they are called, and how they are read."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from pyramid.path import DottedNameResolver
from pyramid.settings import asbool, aslist, falsey, truthy

from pyams_zmq.config.files import check_users, resolve_key, resolve_keys, resolve_path
from pyams_zmq.pool.protocol import MAX_INTERVAL, MIN_INTERVAL
from pyams_zmq.process.base import ReadyProcess
from pyams_zmq.process.ipc_file import check_mode, find_group

_BOOLEANS = truthy | falsey
_STARTS = ('auto', 'external', 'never')


class Kind(NamedTuple):
    """What the value of an option can be.

    :ivar label: its description, for errors and documentation
    :ivar read: returns the value, checked and converted, from that of a setting or an argument; its
        second argument is the configurator, None on the command line
    """

    label: str
    read: Callable[[Any, Any], Any] = lambda value, _config: value


def _number(label: str, hint: Any) -> Kind:
    return Kind(label, lambda value, _config: msgspec.convert(value, hint, strict=False))


def _read_boolean(value: Any, _config: Any) -> Any:
    is_boolean = isinstance(value, str) and value.strip().lower() in _BOOLEANS
    return msgspec.convert(asbool(value) if is_boolean else value, bool)


def _read_start(value: Any, _config: Any) -> str:
    """Return what starts a service; packages pass on a setting that is true, false or missing."""
    text = '' if value is None else str(value).strip().lower()
    if not text or text in _BOOLEANS:
        return 'auto' if asbool(value) else 'never'
    if text not in _STARTS:
        raise ValueError(f'{value!r} is not allowed; write {START.label}')
    return text


def _read_names(value: Any, _config: Any) -> Any:
    return msgspec.convert(aslist(value), tuple[str, ...])


def _import(value: Any, config: Any, label: str) -> Any:
    try:
        return config.maybe_dotted(value)
    except (ValueError, ImportError, AttributeError) as error:
        raise ValueError(f'{value!r} cannot be imported ({error}); write {label}') from None


def _read_class(value: Any, config: Any) -> Any:
    found = _import(value, config, CLASS.label)
    if not callable(found):
        raise TypeError(f'{found!r} is not a class; write {CLASS.label}')
    if isinstance(found, type) and not issubclass(found, ReadyProcess):
        raise TypeError(
            f'{found!r} is not a subclass of ZMQProcess; the class with the methods is the handler'
        )
    return found


def _read_keys(value: Any, _config: Any) -> Any:
    """Return an object with CURVE keys; an error does not repeat a text, which may be a key."""
    if isinstance(value, str):
        try:
            value = DottedNameResolver().resolve(value)
        except Exception:  # noqa: BLE001 - modules fail in any way
            raise ValueError(
                f'It cannot be imported; write {KEYS.label}, or use the settings for the text of '
                'keys, as server_key and client_keys'
            ) from None
    return value() if callable(value) else value


def _read_group(value: Any, _config: Any) -> Any:
    find_group(value)
    return value


ADDRESS = Kind('an address')
ADDRESSES = Kind('addresses or networks, separated by blanks')
BOOLEAN = Kind('true or false', _read_boolean)
CLASS = Kind('a class, or its dotted name', _read_class)
DURATION = _number('a number above 0', Annotated[float, Meta(gt=0)])
FILE = Kind('a file', resolve_path)
GROUP = Kind('a group, by its name or id', _read_group)
HANDLER: Kind = Kind(
    'a class with the methods, an instance of one, or a ZMQMessageHandler; or a dotted name',
    lambda value, config: _import(value, config, HANDLER.label),
)
INTEGER = _number('an integer, 0 or more', Annotated[int, Meta(ge=0)])
INTERVAL = _number(
    f'a number from {MIN_INTERVAL} to {MAX_INTERVAL:g}',
    Annotated[float, Meta(ge=MIN_INTERVAL, le=MAX_INTERVAL)],
)
KEYS = Kind('an object with keys, a function that returns it, or a dotted name', _read_keys)
MODE = Kind('octal digits', lambda value, _config: check_mode(value))
NAMES = Kind('names, separated by blanks', _read_names)
NUMBER = _number('a number, 0 or more', Annotated[float, Meta(ge=0, le=1e8)])
POSITIVE = _number('an integer, 1 or more', Annotated[int, Meta(ge=1)])
PUBLIC_KEY = Kind('a key, or its .key file', resolve_key)
PUBLIC_KEYS = Kind('a folder of .key files, or keys', resolve_keys)
SECRET_KEY = Kind('a key, or its .key_secret file', resolve_key)
START = Kind('auto, external or never; or true for auto, false for never', _read_start)
USER = Kind('user:password', check_users)
USERS = Kind('user:password, one a line', check_users)
