# SPDX-License-Identifier: ZPL-2.1
"""The methods of a message handler, and what is declared of them."""

from collections.abc import Callable
from functools import partialmethod, singledispatchmethod
from inspect import Parameter, iscoroutinefunction, signature
from math import inf
from typing import Any, NamedTuple, TypeVar

from pyams_zmq.wire.message import check_timeout

_WRAPPED = (staticmethod, classmethod, partialmethod, singledispatchmethod)
_LONGEST = 1e8  # seconds: some years, which loops can still count
_T = TypeVar('_T')


def zmq_method(
    *, timeout: float | None = None, repeatable: bool | None = None
) -> Callable[[_T], _T]:
    """Declare properties of a method that answers messages; decorator.

    What is not said here is that of the class: its attributes `timeout`, seconds, and
    `repeatable`, true or a collection of names.

    :param timeout: seconds after which the caller gets ``[504, text]``. An `async def` method is
        cancelled then; a plain one goes on, and keeps its place, until it ends. `math.inf` for a
        method without limit in a class that has one
    :param repeatable: true, if a pool may call the method once more for a message whose worker
        has died
    :raises ValueError: if *timeout* is no number above 0
    """
    if timeout is not None:
        check_timeout(timeout)

    def declare(method: _T) -> _T:
        method.zmq_options = (timeout, repeatable)  # type: ignore[attr-defined] # ours
        return method

    return declare


class Method(NamedTuple):
    """A method of a message handler."""

    call: Callable[..., Any]
    name: str = ''
    least: int = 0
    """Frames of a message that it takes at least"""
    most: float = inf
    wants_peer: bool = False
    wants_request: bool = False
    is_async: bool = False
    timeout: float | None = None
    repeatable: bool | None = None
    in_thread: bool = False


def methods_of(handler: Any) -> dict[str, Method]:
    """Find the methods that a peer may name.

    They are looked up on the class, statically: no property runs, nothing that an instance holds
    can be reached, and a private name does not differ from one that does not exist.

    :param handler: instance of a handler class
    :raises ValueError: if the `timeout` of the class is no number above 0, or its `repeatable`
        names a method that there is not
    """
    attributes: dict[str, Any] = {}
    for base in reversed(type(handler).__mro__):
        attributes.update(vars(base))
    methods = {}
    for name, attribute in attributes.items():
        if (
            not name.startswith('_')
            and not isinstance(attribute, type)
            and (callable(attribute) or isinstance(attribute, _WRAPPED))
        ):
            call = getattr(handler, name)
            if isinstance(attribute, singledispatchmethod):
                methods[name] = Method(call, name)  # each of its functions has a signature
            elif callable(call):
                methods[name] = _inspect(call, name)
            else:
                continue
            options = getattr(attribute, 'zmq_options', getattr(call, 'zmq_options', (None, None)))
            methods[name] = methods[name]._replace(timeout=options[0], repeatable=options[1])
    return _complete(type(handler), methods)


def _inspect(call: Callable[..., Any], name: str) -> Method:
    """Read the signature of a method."""
    try:
        parameters = signature(call).parameters.values()
    except ValueError:  # some builtins have none
        return Method(call, name)
    positional = [
        item
        for item in parameters
        if item.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    least = sum(item.default is Parameter.empty for item in positional)
    varies = any(item.kind is Parameter.VAR_POSITIONAL for item in parameters)
    keywords = {item.name for item in parameters if item.kind is Parameter.KEYWORD_ONLY}
    most = inf if varies else len(positional)
    is_async = iscoroutinefunction(call)
    return Method(call, name, least, most, 'peer' in keywords, 'request' in keywords, is_async)


def _complete(cls: type, methods: dict[str, Method]) -> dict[str, Method]:
    """Fill in what the class says of all its methods; a method of that name is no declaration."""
    timeout: Any = getattr(cls, 'timeout', None)
    if not timeout or not isinstance(timeout, (int, float)):
        timeout = None  # something else of that name, in a class which is older than ours
    repeatable: Any = False if 'repeatable' in methods else getattr(cls, 'repeatable', False)
    if timeout is not None:
        check_timeout(timeout)
    if isinstance(repeatable, bool):
        repeatable = methods if repeatable else ()
    unknown = {repeatable} if isinstance(repeatable, str) else set(repeatable) - set(methods)
    if unknown:
        raise ValueError(
            f'{cls.__name__}.repeatable names what is no method: {sorted(unknown)}; write True or '
            'a collection of names'
        )
    for name, method in methods.items():
        limit = timeout if method.timeout is None else method.timeout
        again = name in repeatable if method.repeatable is None else method.repeatable
        methods[name] = method._replace(
            timeout=None if limit is None or limit > _LONGEST else limit, repeatable=again
        )
    return methods
