# SPDX-License-Identifier: ZPL-2.1
"""The arguments of a message as those of a method: by position, by name, and of their types."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, Signature
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.annotations import Annotation, Converter, read_annotation

INJECTED = frozenset({'peer', 'request'})
"""Keyword-only parameters of the handler, which messages cannot pass"""

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_SELF = frozenset({'self', 'cls'})
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_PATH = re.compile(r"(.*) - at '\$(.*)'", re.DOTALL).fullmatch
_MODULES = re.compile(r'(?:[^\W\d]\w*\.|<locals>\.)+')
_MAX_TEXT = 200  # characters of a problem, which may quote the message


def arguments_of(
    call: Callable[..., Any],
    name: str,
    signature: Signature,
    owner: type,
    spread: bool,
    injected: frozenset[str] = INJECTED,
) -> 'Arguments | None':
    """Return how a method gets the arguments of a message of one frame.

    :param call: the method
    :param name: name of the method
    :param owner: class of the handler
    :param spread: true if the method declares that it takes arguments by position or name
    :param injected: names of keyword-only parameters that the handler passes
    :return: None, if its first parameter gets them as they were decoded
    """
    parameters = [
        item
        for item in signature.parameters.values()
        if item.kind is not Parameter.KEYWORD_ONLY or item.name not in injected
    ]
    if not spread and any(item.kind is Parameter.VAR_POSITIONAL for item in parameters):
        return None
    whole = next((item for item in parameters if item.kind in _POSITIONAL), None)
    annotation = Annotation() if whole is None else read_annotation(whole, call, owner, name)
    if whole is None or annotation.is_scalar or _count_required(parameters) > 1:
        spread = True
    annotations = {} if whole is None else {whole.name: annotation}
    for item in parameters if spread else ():
        if item is not whole and item.kind not in _VARIADIC:
            annotations[item.name] = read_annotation(item, call, owner, name)
    converters = {
        key: annotation.convert
        for key, annotation in annotations.items()
        if annotation.convert is not None
    }
    if not spread and not converters:
        return None
    return Arguments(call, name, parameters, converters, spread, injected)


class Arguments:
    """Makes the arguments of a method from those of a message of one frame.

    :param call: the method
    :param name: name of the method
    :param parameters: its parameters, without those that are injected
    :param converters: functions that convert arguments, by name of their parameter
    :param spread: true if an array contains the arguments by position, and an object by name;
        otherwise the first parameter gets it
    :param injected: names that a message cannot pass
    """

    def __init__(
        self,
        call: Callable[..., Any],
        name: str,
        parameters: list[Parameter],
        converters: Mapping[str, Converter],
        spread: bool,
        injected: frozenset[str] = INJECTED,
    ):
        self._call = call
        self._name = name
        self._signature = Signature(parameters)
        self._converters = converters
        self._spread = spread
        self._is_optional = not _count_required(parameters)
        self._reserved = (injected | _SELF) - self._signature.parameters.keys()

    def bind(self, args: Any) -> 'partial[Any]':
        """Return a call of the method.

        :param args: decoded arguments of a message
        :raises ZMQMessageError: with status 400, if the method does not take them
        """
        values: Any = (args,)
        names: dict[str, Any] = {}
        if args is None and self._is_optional:
            values = ()
        elif self._spread and type(args) is list:
            values = args
        elif self._spread and type(args) is dict:
            values, names = (), args
        if reserved := self._reserved.intersection(names):  # `**names` would take them
            raise self._refusal(f'{min(reserved)} cannot be passed')
        try:
            bound = self._signature.bind(*values, **names)
        except TypeError as error:
            raise self._refusal(str(error)) from None
        for name, convert in self._converters.items():
            if name in bound.arguments:
                bound.arguments[name] = self._convert(name, convert, bound.arguments[name])
        return partial(self._call, *bound.args, **bound.kwargs)

    def _convert(self, name: str, convert: Converter, value: Any) -> Any:
        if value is None and self._signature.parameters[name].default is None:
            return None  # `name: str = None` is common for `str | None`
        try:
            return convert(value)
        except RecursionError:
            text = 'it is nested too deep'
        except ValueError as error:
            text = str(error).replace('`', "'")
            if match := _PATH(text):
                text, path = match.groups()
                name += path
        raise self._refusal(f'{name}: {text}')

    def _refusal(self, problem: str) -> ZMQMessageError:
        text = f'Bad arguments of {self._name!r}: {problem[:_MAX_TEXT]}; it takes {self}'
        return ZMQMessageError(400, text)

    def __str__(self) -> str:
        """Return the signature, without the values of defaults, which may be secret."""
        parameters = [
            item.replace(
                default=item.default if item.default is Parameter.empty else _Text('…'),
                annotation=_describe(item.annotation),
            )
            for item in self._signature.parameters.values()
        ]
        return f'{self._name}{Signature(parameters)}'


class _Text(str):
    """A text without quotes in a signature."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _count_required(parameters: list[Parameter]) -> int:
    return sum(
        item.default is Parameter.empty and item.kind not in _VARIADIC for item in parameters
    )


def _describe(annotation: Any) -> Any:
    """Return an annotation without the names of modules."""
    if annotation is Parameter.empty:
        return annotation
    if not isinstance(annotation, str):
        is_class = isinstance(annotation, type) and not hasattr(annotation, '__origin__')
        annotation = annotation.__qualname__ if is_class else repr(annotation)
    return _Text(_MODULES.sub('', annotation))
