# SPDX-License-Identifier: ZPL-2.1
"""The arguments of a message as those of a method: by position, by name, and of their types."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import Parameter, Signature
from typing import Any

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.annotations import Annotation, Converter, read_annotation

LOGGER = logging.getLogger('PyAMS (zmq)')

INJECTED = frozenset({'peer', 'request'})
"""Keyword-only parameters of the handler, which messages cannot pass"""

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_SELF = frozenset({'self', 'cls'})
VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_PATH = re.compile(r"(.*) - at '\$(.*)'", re.DOTALL).fullmatch
# Names of modules, and texts such as those of `Literal`, which stay as they are.
_MODULES = re.compile(r"""('[^']*'|"[^"]*")|(?:[^\W\d]\w*\.|<locals>\.)+""")
_MAX_TEXT = 200  # characters of a problem, which may quote the message


def arguments_of(
    call: Callable[..., Any],
    name: str,
    signature: Signature,
    owner: type,
    spread: bool,
    injected: frozenset[str] = INJECTED,
) -> 'tuple[Arguments | None, Arguments | None]':
    """Return how a method gets its arguments.

    :param call: the method
    :param name: name of the method
    :param owner: class of the handler
    :param spread: true if the method declares that it takes arguments by position or name
    :param injected: names of keyword-only parameters that the handler passes
    :return: from a message of one frame, None if its first parameter gets them as they were
        decoded; and from one of several frames, None if it gets these as they are
    """
    parameters = [
        item
        for item in signature.parameters.values()
        if item.kind is not Parameter.KEYWORD_ONLY or item.name not in injected
    ]
    if not spread and any(item.kind is Parameter.VAR_POSITIONAL for item in parameters):
        return None, None
    whole = next((item for item in parameters if item.kind in _POSITIONAL), None)
    annotation = Annotation() if whole is None else read_annotation(whole, call, owner, name)
    if whole is None or annotation.is_scalar or _count_required(parameters) > 1:
        spread = True
    annotations = {} if whole is None else {whole.name: annotation}
    # What only a further frame passes is converted, too: else a peer that sends one could pass a
    # value of any type. But that is unusual, and older handlers may have any annotation there.
    level = logging.WARNING if spread else logging.DEBUG
    for item in parameters:
        is_passed = item.kind in _POSITIONAL or (spread and item.kind is Parameter.KEYWORD_ONLY)
        if is_passed and item is not whole:
            annotations[item.name] = read_annotation(item, call, owner, name, level)
    converters = {
        key: annotation.convert
        for key, annotation in annotations.items()
        if annotation.convert is not None
    }
    arguments = Arguments(call, name, parameters, converters, spread, injected)
    if arguments.confusing:
        LOGGER.warning(
            '%s.%s: a message of one frame cannot pass %s; to get that of the message, write it '
            'behind `*`',
            owner.__name__,
            name,
            min(arguments.confusing),
        )
    return (
        arguments if spread or annotation.convert is not None else None,
        arguments if converters else None,
    )


class Arguments:
    """Makes the arguments of a method from those of a message.

    :param call: the method
    :param name: name of the method
    :param parameters: its parameters, without those that are injected
    :param converters: functions that convert arguments, by name of their parameter
    :param spread: true if an array contains the arguments by position, and an object by name;
        otherwise the first parameter gets it
    :param injected: names of keyword-only parameters that the handler passes
    :ivar confusing: those of them that are not keyword-only, behind the first parameter. The
        handler does not pass them. Neither can a message, which could name another user, except in
        one of several frames if they have no type, as in pyams_zmq 2
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
        self._names = list(self._signature.parameters)
        self.confusing = injected.intersection(self._names[1:])
        self._reserved = (injected | _SELF).difference(self._names) | self.confusing

    def bind(self, args: Any) -> 'partial[Any]':
        """Return a call of the method for a message of one frame.

        :param args: decoded arguments of the message
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
        return self._bind(values, names, self._reserved)  # `**names` would take some of these

    def bind_frames(self, frames: list[Any]) -> 'partial[Any]':
        """Return a call of the method for a message of several frames.

        :param frames: its frames, one of which was replaced by the decoded arguments
        :raises ZMQMessageError: with status 400, if the method does not take them
        """
        return self._bind(frames, {}, self.confusing & self._converters.keys())

    def _bind(
        self, values: Sequence[Any], names: Mapping[str, Any], reserved: frozenset[str]
    ) -> 'partial[Any]':
        if refused := reserved.intersection((*names, *self._names[1 : len(values)])):
            raise self._refusal(f'{min(refused)} cannot be passed')
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
    return sum(item.default is Parameter.empty and item.kind not in VARIADIC for item in parameters)


def _describe(annotation: Any) -> Any:
    """Return an annotation without the names of modules."""
    if annotation is Parameter.empty:
        return annotation
    if not isinstance(annotation, str):
        is_class = isinstance(annotation, type) and not hasattr(annotation, '__origin__')
        annotation = annotation.__qualname__ if is_class else repr(annotation)
    return _Text(_MODULES.sub(lambda match: match[1] or '', annotation))
