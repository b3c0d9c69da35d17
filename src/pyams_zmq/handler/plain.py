# SPDX-License-Identifier: ZPL-2.1
"""What a service takes as its handler: a plain class with the methods, or a factory."""

import inspect
from types import TracebackType
from typing import Any

from pyams_zmq.exceptions import ZMQHandlerError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.interfaces import IZMQMessageHandler

_DECLARATION_ERRORS = (TypeError, ValueError, AttributeError)  # an instance may have `__slots__`


def is_plain(handler: Any) -> bool:
    """Return True if a handler only has the methods, and needs a ZMQMessageHandler around it.

    That is a class without `__call__`, or an instance that cannot be called. Everything else, a
    subclass of ZMQMessageHandler for instance, is a factory of message handlers.
    """
    if not isinstance(handler, type):
        return not callable(handler)
    has_call = any('__call__' in vars(cls) for cls in handler.__mro__[:-1])
    return not (has_call or IZMQMessageHandler.implementedBy(handler))


def make_handler(handler: Any, process: Any, stream: Any) -> Any:
    """Return the message handler of a process.

    :param handler: plain class, instance or factory, see `is_plain`
    :param process: the ZMQProcess
    :param stream: the stream that receives the messages
    :raises ZMQHandlerError: if it cannot be made, however often that is tried: its declaration is
        wrong
    :raises Exception: an error of its own code, for instance because a database is down
    """
    try:
        _check_call(handler)
        if is_plain(handler):
            made = ZMQMessageHandler(process, stream, process.stop, handler=handler)
            _check_methods(made)
            return made
        return handler(process, stream, process.stop)
    except Exception as error:
        if _is_of_declaration(error):
            raise ZMQHandlerError(_describe(handler, error)) from error
        raise


def check_handler(handler: Any, concurrency: int = 1, *, takes_jobs: bool = True) -> None:
    """Check as much of a handler as can be known without making it.

    :param concurrency: messages that its process handles at a time
    :param takes_jobs: false if its process does not run jobs
    :raises ZMQHandlerError: if it cannot be made
    """
    is_own = is_plain(handler)
    try:
        _check_call(handler)
        if not (is_own or _is_message_handler(handler)):
            return  # only a call shows what a factory makes
        methods = handler if is_own else handler.handler
        # Without its constructor, which may open a database: not before the process is forked.
        blank = _make_blank(methods if isinstance(methods, type) else type(methods))
        if blank is not None or methods is None:
            factory = ZMQMessageHandler if is_own else handler
            made = factory(None, _Stream(concurrency, takes_jobs), lambda: None, handler=blank)
            if is_own:
                _check_methods(made)
    except Exception as error:  # noqa: BLE001 - its code may need what its constructor makes
        if _is_of_declaration(error):
            raise ZMQHandlerError(_describe(handler, error)) from None


class _Stream:
    """A stream, as far as the declarations of methods depend on it."""

    def __init__(self, concurrency: int, takes_jobs: bool):
        self.concurrency = concurrency
        self.takes_jobs = takes_jobs

    def detach(self) -> None:
        """Exist: only a stream that sends replies has this method."""


def _is_message_handler(handler: Any) -> bool:
    """Return True for a subclass of ZMQMessageHandler that is made as that is."""
    return (
        isinstance(handler, type)
        and issubclass(handler, ZMQMessageHandler)
        and handler.__init__ is ZMQMessageHandler.__init__
    )


def _check_call(handler: Any) -> None:
    """Check that a handler can be called: a class without arguments, a factory with three.

    :raises TypeError: if it cannot, or is a value, such as a number, or a module
    """
    if is_plain(handler):
        cls = handler if isinstance(handler, type) else type(handler)
        if cls.__module__ == 'builtins':
            raise TypeError(
                f'{handler!r} is not a class of the application: write a class with the methods'
            )
        methods = handler
    elif _is_message_handler(handler):
        methods = handler.handler
    else:
        if (problem := _find_problem(handler, 'process', 'stream', 'stop')) is not None:
            raise TypeError(
                f'it is called with the process, the stream and a function that stops it '
                f'({problem}): take these, or write a class with the methods'
            )
        return
    if isinstance(methods, type):
        _check_constructor(methods)


def _find_problem(function: Any, *args: Any) -> TypeError | None:
    """Return why a function cannot be called with these arguments; None if it is not known."""
    try:
        # Not that of a function which a decorator calls with other arguments.
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # of a class in C
        return None
    try:
        signature.bind(*args)
    except TypeError as error:
        return error
    return None


def _check_methods(made: ZMQMessageHandler) -> None:
    """Check that a plain handler has a method.

    :raises TypeError: if it has none
    """
    if not made.methods:
        name = type(made.rep_handler).__name__
        raise TypeError(f'{name} has no public method: write one for each type of message')


def _check_constructor(cls: type) -> None:
    """Check that a class can be called without arguments.

    :raises TypeError: if its constructor needs some, or it is abstract
    """
    if inspect.isabstract(cls):
        names = ', '.join(sorted(vars(cls)['__abstractmethods__']))
        raise TypeError(f'{cls.__name__} is abstract: it has no {names}')
    if (problem := _find_problem(cls)) is not None:
        raise TypeError(
            f'the constructor of {cls.__name__} needs arguments ({problem}): pass an instance, or '
            'a class that needs none'
        )


def _make_blank(cls: type) -> Any:
    """Return an instance whose constructor was not called; None if that is not possible."""
    if hasattr(cls, '__del__'):  # it may need what the constructor sets
        return None
    try:
        return object.__new__(cls)
    except TypeError:  # derived from a class in C
        return None


def _is_of_declaration(error: BaseException) -> bool:
    """Return True if an error was raised by this package, without code of the handler in between.

    Then it does not depend on anything that changes: each attempt to make the handler has it.
    """
    if not isinstance(error, _DECLARATION_ERRORS):
        return False
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get('__name__', '')
        if not name.startswith('pyams_zmq.'):
            return False
        traceback = traceback.tb_next
    return True


def _describe(handler: Any, error: BaseException) -> str:
    cls = handler if hasattr(handler, '__qualname__') else type(handler)
    name = f'{cls.__module__}.{cls.__qualname__}'
    return f'The handler {name} cannot be made: {error}'
