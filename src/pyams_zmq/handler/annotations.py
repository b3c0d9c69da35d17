# SPDX-License-Identifier: ZPL-2.1
"""The types of annotated parameters, and the functions that convert decoded JSON to them."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Parameter, unwrap
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import msgspec
from msgspec import inspect as nodes
from zope.interface.interfaces import IInterface

from pyams_zmq.wire.values import find_decoder

LOGGER = logging.getLogger('PyAMS (zmq)')

Converter = Callable[[Any], Any]

_SCALARS = (
    nodes.NoneType,
    nodes.BoolType,
    nodes.IntType,
    nodes.FloatType,
    nodes.StrType,
    nodes.BytesType,
    nodes.ByteArrayType,
    nodes.DateTimeType,
    nodes.DateType,
    nodes.TimeType,
    nodes.TimeDeltaType,
    nodes.UUIDType,
    nodes.DecimalType,
    nodes.EnumType,
    nodes.LiteralType,
)
_ANY = nodes.AnyType()
# Values of these types are not checked: handlers may have been annotated when nobody did.
_UNCHECKED = (
    _ANY,
    nodes.CustomType(object),
    nodes.ListType(_ANY),
    nodes.DictType(_ANY, _ANY),
    nodes.DictType(nodes.StrType(), _ANY),
)


class Annotation(NamedTuple):
    """What the annotation of a parameter means for its values.

    :ivar convert: function that converts a decoded value, raising a ValueError; None if it is
        passed as it is
    :ivar is_scalar: true if the JSON form is neither an array nor an object
    """

    convert: Converter | None = None
    is_scalar: bool = False


def read_annotation(
    parameter: Parameter,
    call: Callable[..., Any],
    owner: type,
    name: str,
    level: int = logging.WARNING,
) -> Annotation:
    """Return what the annotation of a parameter means; log it if the annotation cannot be used.

    :param call: the method
    :param owner: class of the handler
    :param name: name of the method
    :param level: level of the record
    """
    if parameter.annotation is Parameter.empty:
        return Annotation()
    try:
        hint = _resolve(parameter.annotation, call, owner)
        if IInterface.providedBy(hint):
            return _read_class(hint)
        node = nodes.type_info(hint)
        for part in _parts_of(node):
            if isinstance(part, nodes.CustomType) and part.cls is not object:
                _read_class(part.cls)  # for its error
    except Exception as error:  # noqa: BLE001 - msgspec, and the evaluated text, raise anything
        LOGGER.log(
            level,
            '%s.%s: values of %r are not converted, because its annotation cannot be used (%s: %s)',
            owner.__name__,
            name,
            parameter.name,
            type(error).__name__,
            error,
        )
        return Annotation()
    alternatives = node.types if isinstance(node, nodes.UnionType) else (node,)
    is_scalar = all(isinstance(each, _SCALARS) for each in alternatives)
    if not is_scalar and all(
        each in _UNCHECKED or isinstance(each, nodes.NoneType) for each in alternatives
    ):
        return Annotation()
    for path, cls in _fields_without_decoder(node, parameter.name):
        LOGGER.log(
            level,
            '%s.%s: each message is refused, because %s has no decoder, see `add_zmq_encoder` (%s)',
            owner.__name__,
            name,
            cls.__name__,
            path,
        )
    convert = partial(msgspec.convert, type=hint, dec_hook=_decode, str_keys=True)
    return Annotation(convert, is_scalar)


def _resolve(annotation: Any, call: Callable[..., Any], owner: type) -> Any:
    """Return the type that an annotation means, which may be a text, or contain one."""
    holder = SimpleNamespace(__annotations__={'hint': annotation})
    function: Any = unwrap(call)
    while isinstance(function, partial):
        function = unwrap(function.func)
    names = getattr(function, '__globals__', {})
    try:
        hints = get_type_hints(holder, names, include_extras=True)
    except NameError:  # a class inside the handler class; other names there may hide builtins
        hints = get_type_hints(holder, names, dict(vars(owner)), include_extras=True)
    return hints['hint']


def _read_class(cls: Any) -> Annotation:
    """Return how values of a class or interface are converted.

    :raises LookupError: if it has no decoder
    """
    if find_decoder(cls) is None:
        raise LookupError(f'{cls.__name__} has no decoder, see `add_zmq_encoder`')
    return Annotation(partial(_decode, cls))


def _parts_of(node: nodes.Type) -> Iterator[nodes.Type]:
    """Yield a type and those of its items, but not those of the fields of a class."""
    yield node
    for field in node.__struct_fields__:
        value = getattr(node, field)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, nodes.Type):
                yield from _parts_of(part)


def _fields_without_decoder(
    node: Any, path: str, seen: tuple[Any, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield path and class of the required fields for which no value can be made."""
    seen = (*seen, node)  # a field of a class may be of the same class
    for field in getattr(node, 'fields', ()):
        part, inner = field.type, f'{path}.{field.encode_name}'
        if not field.required or any(part is each for each in seen):
            continue
        if isinstance(part, nodes.CustomType) and part.cls is not object:
            if find_decoder(part.cls) is None:
                yield inner, part.cls
        else:
            yield from _fields_without_decoder(part, inner, seen)


def _decode(cls: Any, value: Any) -> Any:
    """Convert a decoded value to a class or interface, with the decoder of an application.

    :raises ValueError: if it is not allowed
    """
    decode = find_decoder(cls)
    if decode is None:  # msgspec checks the type
        return value
    try:
        return decode(value)
    except ValueError:
        raise
    except Exception as error:
        # Of a wrong form, usually. The text is for the log of the service only.
        LOGGER.debug('The decoder of %s has failed', cls.__name__, exc_info=True)
        raise ValueError(f'Expected the JSON form of `{cls.__name__}`') from error
