# SPDX-License-Identifier: ZPL-2.1
"""Plain classes as handlers, and handlers that cannot be made."""

import os
from abc import ABC, abstractmethod
from functools import wraps
from pathlib import Path

from zope.interface import implementer

from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.interfaces import IZMQMessageHandler


class Plain:
    """Has methods, and nothing else."""

    greeting = 'hello'

    def greet(self, name):
        return [200, f'{self.greeting} {name}']

    def pid(self, args):
        return [200, os.getpid()]

    def seat(self, args):
        return [200, self.process.registry.__name__]


class Polite(Plain):
    """Is made with an argument, by the application."""

    def __init__(self, greeting):
        self.greeting = greeting


POLITE = Polite('good day')
"""An instance, by its dotted name"""


class PlainMessageHandler(ZMQMessageHandler):
    """Serves Plain."""

    handler = Plain


class PoliteMessageHandler(ZMQMessageHandler):
    """Its class needs an argument."""

    handler = Polite


class NoHandler(ZMQMessageHandler):
    """Has no class."""


class OwnConstructor(ZMQMessageHandler):
    """Knows what its class needs."""

    handler = Polite

    def __init__(self, process, stream, stop):
        super().__init__(process, stream, stop, handler=Polite('hey'))


class Callable:
    """A class with `__call__` is a factory, as a function is."""

    def __init__(self, process, stream, stop):
        self.inner = PlainMessageHandler(process, stream, stop)

    def __call__(self, frames):
        self.inner(frames)


@implementer(IZMQMessageHandler)
class Declared:
    """Says that it is a message handler."""


class Empty:
    """Has no method for messages."""

    name = 'empty'

    def _private(self, args):
        """Not for messages."""


class Abstract(ABC):
    """Cannot be instantiated."""

    @abstractmethod
    def greet(self, name):
        """Greet somebody."""


class BadTimeout:
    """Has a bad declaration."""

    timeout = -1

    def greet(self, name):
        return [200, name]


class BadTimeoutOfResource(BadTimeout):
    """The same, but only a process can know it: without its constructor, none is made."""

    def __del__(self):
        """Close what the constructor has opened."""


class BadRepeatable:
    """Names a method that it does not have."""

    repeatable = ('grete',)

    def greet(self, name):
        return [200, name]


class NoProcess:
    """Does not take the attribute `process`."""

    __slots__ = ()

    def greet(self, name):
        return [200, name]


class AsyncRequest:
    """Its method takes a request, which is not possible with a concurrency above 1."""

    @zmq_method(timeout=10)
    async def greet(self, name, *, request):
        return [200, name]


class Counted:
    """Counts how often it is made; has a descriptor that needs the constructor."""

    made = 0

    class Descriptor:
        """A method that is looked up in an attribute of the instance."""

        def __get__(self, instance, owner=None):
            return instance.function

        def __call__(self):
            """Look like a method."""

    look_up = Descriptor()

    def __init__(self):
        type(self).made += 1
        self.function = lambda args: [200, args]

    def greet(self, name):
        return [200, name]


class Closing(Plain):
    """Cannot be deleted before its constructor has run."""

    def __init__(self):
        self.file = Path(os.devnull).open('rb')  # noqa: SIM115 - closed below

    def __del__(self):
        self.file.close()


class Table(dict):
    """Derived from a class in C."""

    def size(self, args):
        return [200, len(self)]


def wrong_factory(process):
    """Is no factory of handlers: it takes one argument."""


def give_name(method):
    """Decorate a function that needs a name: it is called without one."""

    @wraps(method)
    def call(*args):
        return method(*args, 'Ann')

    return call


class Injected(Plain):
    """Its constructor gets an argument from a decorator."""

    @give_name
    def __init__(self, name):
        self.greeting = f'{name} says hello,'


@give_name
def decorated_factory(process, stream, stop, name):
    """Make a message handler; the decorator adds the name."""
    return PlainMessageHandler(process, stream, stop)
