# SPDX-License-Identifier: ZPL-2.1
"""The methods of a message handler, and their declared properties."""

import logging
from collections.abc import Callable
from functools import partialmethod, singledispatchmethod
from inspect import Parameter, Signature, iscoroutinefunction, signature, unwrap
from math import inf
from types import MethodType
from typing import Any, NamedTuple, TypeVar

from pyams_zmq.handler.arguments import INJECTED, VARIADIC, Arguments, arguments_of
from pyams_zmq.handler.job import JobPolicy
from pyams_zmq.handler.statistics import MethodStats
from pyams_zmq.wire.message import check_boolean, check_timeout

LOGGER = logging.getLogger('PyAMS (zmq)')

_DESCRIPTORS = (staticmethod, classmethod, partialmethod, singledispatchmethod)
_NO_OPTIONS = (None, None, False)
_MAX_TIMEOUT = 1e8  # seconds: three years; the clock of a loop can represent it
_T = TypeVar('_T')


def zmq_method(
    *, timeout: float | None = None, repeatable: bool | None = None, spread: bool = False
) -> Callable[[_T], _T]:
    """Declare properties of a method that handles messages; a decorator.

    The defaults are the class attributes `timeout`, in seconds, and `repeatable`, true or a
    collection of names.

    :param timeout: seconds after which the caller gets ``[504, text]``. An `async def` method is
        cancelled then; a plain one continues, and counts for the `concurrency`, until it ends.
        `math.inf` for a method without limit in a class that has one
    :param repeatable: true if a pool may call the method again for a message whose worker has died
    :param spread: true if a message contains the arguments of the method by position, in an array,
        or by name, in an object; needed only for a method with one required parameter
    :raises ValueError: if *timeout* is not a number above 0
    :raises TypeError: if *repeatable* or *spread* is not a boolean
    """
    if timeout is not None:
        check_timeout(timeout)
    if repeatable is not None:
        check_boolean('repeatable', repeatable)
    check_boolean('spread', spread)

    def declare(method: _T) -> _T:
        method.zmq_options = (timeout, repeatable, spread)  # type: ignore[attr-defined] # ours
        return method

    return declare


class Method(NamedTuple):
    """A method of a message handler.

    :ivar arguments: makes the arguments of `call` from a message of one frame; None if the first
        parameter gets them as they were decoded
    :ivar frame_arguments: the same for a message of several frames; None if `call` gets these
    :ivar min_frames: minimum number of frames of a message, at least 2 if there are *arguments*
    :ivar max_frames: maximum number of frames
    :ivar in_thread: true if it runs in a thread
    :ivar job: how often it is tried if it is a job, or None
    :ivar stats: counts its calls
    """

    call: Callable[..., Any]
    name: str = ''
    min_frames: int = 0
    max_frames: float = inf
    wants_peer: bool = False
    wants_request: bool = False
    wants_job: bool = False
    is_async: bool = False
    timeout: float | None = None
    repeatable: bool | None = None
    in_thread: bool = False
    job: JobPolicy | None = None
    arguments: Arguments | None = None
    frame_arguments: Arguments | None = None
    stats: MethodStats = MethodStats()  # of all that no handler has


def methods_of(handler: Any) -> dict[str, Method]:
    """Return the methods that a message can name.

    They are looked up statically, on the class: no property runs, attributes of the instance cannot
    be reached, and a private name is the same as an unknown one.

    :param handler: instance of a handler class
    :raises ValueError: if the `timeout` of the class is not a number above 0, its `repeatable`
        contains an unknown method, or a job is declared in a way that has no effect
    """
    attributes: dict[str, Any] = {}
    for base in reversed(type(handler).__mro__):
        attributes.update(vars(base))
    methods = {}
    for name, attribute in attributes.items():
        if (
            not name.startswith('_')
            and not isinstance(attribute, type)
            and (callable(attribute) or isinstance(attribute, _DESCRIPTORS))
        ):
            call = getattr(handler, name)
            if not callable(call):
                continue
            # Each function of a singledispatchmethod has its own signature.
            is_single = isinstance(attribute, singledispatchmethod)
            options = getattr(attribute, 'zmq_options', getattr(call, 'zmq_options', _NO_OPTIONS))
            timeout, repeatable, spread = options
            job = getattr(attribute, 'zmq_job', getattr(call, 'zmq_job', None))
            method = Method(call, name, job=None if job is None else job[0])
            if not is_single:
                method = _inspect(method, type(handler), spread)
            methods[name] = method._replace(timeout=timeout, repeatable=repeatable)
            if job is not None:  # the time limit of the class is one for calls
                if (timeout, repeatable) != (None, None):
                    raise ValueError(
                        f'{type(handler).__name__}.{name} is a job: timeout and repeatable of '
                        'zmq_method are for calls; write zmq_job(timeout=...), and let it run again'
                    )
                limit = inf if job[1] is None else job[1]
                methods[name] = methods[name]._replace(timeout=limit, repeatable=False)
    return _apply_defaults(type(handler), methods)


def _inspect(method: Method, owner: type, spread: bool) -> Method:
    """Return a method with the properties of its signature."""
    call = method.call
    try:
        declared = signature_of(call)
    except ValueError:  # a builtin without a signature
        return method
    parameters = declared.parameters.values()
    positional = [
        item
        for item in parameters
        if item.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    required = sum(item.default is Parameter.empty for item in positional)
    _check_parameter_job(method, declared, owner)
    is_variadic = any(item.kind is Parameter.VAR_POSITIONAL for item in parameters)
    keywords = {item.name for item in parameters if item.kind is Parameter.KEYWORD_ONLY}
    injected = INJECTED if method.job is None else INJECTED | {'job'}
    arguments, frame_arguments = arguments_of(call, method.name, declared, owner, spread, injected)
    return method._replace(
        min_frames=required if arguments is None else max(required, 2),
        max_frames=inf if is_variadic else len(positional),
        wants_peer='peer' in keywords,
        wants_request='request' in keywords,
        wants_job=method.job is not None and 'job' in keywords,
        is_async=iscoroutinefunction(call),
        arguments=arguments,
        frame_arguments=frame_arguments,
    )


def _check_parameter_job(method: Method, declared: Signature, owner: type) -> None:
    """Check that a parameter `job` gets the job, and that only the method of a job has it.

    :raises ValueError: if it would get the arguments of the message
    """
    job = declared.parameters.get('job')
    if job is None:
        return
    is_keyword = job.kind is Parameter.KEYWORD_ONLY
    if method.job is not None and not is_keyword:
        raise ValueError(
            f'The parameter job of {owner.__name__}.{method.name} would not get the job: write it '
            'behind `*`, as in (self, args, *, job)'
        )
    if method.job is None and is_keyword and job.default is Parameter.empty:
        LOGGER.warning(
            '%s.%s is not a job, so that messages have to pass its argument job: declare it with '
            'zmq_job, or choose another name',
            owner.__name__,
            method.name,
        )


def signature_of(call: Callable[..., Any]) -> Signature:
    """Return the signature of a method, which may be decorated with :func:`functools.wraps`.

    A function that passes on what it gets, ``*args, **kwargs``, has that of the one it wraps.

    :raises ValueError: of a builtin without a signature
    """
    function = getattr(call, '__func__', call)
    target = unwrap(function, stop=_is_explicit)
    if function is not call:
        target = MethodType(target, call.__self__)  # type: ignore[attr-defined] # of a method
    return signature(target, follow_wrapped=not hasattr(target, '__wrapped__'))


def _is_explicit(function: Callable[..., Any]) -> bool:
    """Return True if a function names all parameters that it takes."""
    try:
        parameters = signature(function, follow_wrapped=False).parameters.values()
    except ValueError:  # in C
        return False
    return all(item.kind not in VARIADIC for item in parameters)


def _apply_defaults(cls: type, methods: dict[str, Method]) -> dict[str, Method]:
    """Apply the class attributes `timeout` and `repeatable`, unless they are message types."""
    timeout: Any = getattr(cls, 'timeout', None)
    if not timeout or not isinstance(timeout, (int, float)):
        timeout = None  # another attribute of this name, in a class older than this package
    repeatable: Any = False if 'repeatable' in methods else getattr(cls, 'repeatable', False)
    if timeout is not None:
        check_timeout(timeout)
    if isinstance(repeatable, bool):
        repeatable = methods if repeatable else ()
    unknown = {repeatable} if isinstance(repeatable, str) else set(repeatable) - set(methods)
    if unknown:
        raise ValueError(
            f'{cls.__name__}.repeatable contains {sorted(unknown)}: write True or a collection of '
            'names of methods'
        )
    for name, method in methods.items():
        limit = timeout if method.timeout is None else method.timeout
        methods[name] = method._replace(
            timeout=None if limit is None or limit > _MAX_TIMEOUT else limit,
            repeatable=name in repeatable if method.repeatable is None else method.repeatable,
        )
    return methods
