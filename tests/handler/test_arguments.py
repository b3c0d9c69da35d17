# SPDX-License-Identifier: ZPL-2.1
"""The arguments of a message become those of the method: shapes, types, refusals."""

import enum
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache, partial, partialmethod, wraps
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyramid.registry import Registry
from zope.interface import Interface

import arguments_of_text
from handlers import Process
from pyams_zmq.auth import Peer
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQMessageError, ZMQRemoteError
from pyams_zmq.handler import ZMQMessageHandler, zmq_method
from pyams_zmq.message import add_encoder, decode_reply, encode

SECRET = 'the secret default'
MOMENT = datetime.fromisoformat('2026-01-02T03:04:05')


class Colour(enum.Enum):
    RED = 'red'


class Book(msgspec.Struct):
    title: str
    pages: Annotated[int, msgspec.Meta(ge=1)] = 1


@dataclass
class Point:
    x: int
    inner: 'Point | None' = None


@attrs.define
class Size:
    width: int


class Options(TypedDict):
    quality: int


class Pair(NamedTuple):
    one: int
    two: int


class Money:
    """Has a decoder."""

    def __init__(self, data):
        if data == 'refused':
            raise ValueError('write a number and a currency')
        self.amount, self.currency = data.split()

    def __repr__(self):
        return f'{self.amount} {self.currency}'


class IMoney(Interface):
    """The same."""


class Plain:
    """Has none."""


@dataclass
class Holder:
    money: Money
    plain: Plain | None = None


class INothing(Interface):
    """The same."""


add_encoder(Money, repr, Money)
add_encoder(IMoney, repr, Money)


def logged(method):
    @wraps(method)
    def wrapper(*args, **kwargs):
        return method(*args, **kwargs)

    return wrapper


def with_store(method):
    """Add an argument; the wrapper takes others than the method."""

    @wraps(method)
    def wrapper(self, args):
        return method(self, 'store', args)

    return wrapper


def by_names(method):
    """Pass an object by name."""

    @wraps(method)
    def wrapper(self, args, *, request):
        return [request.method, method(self, **args)]

    return wrapper


class Handler:
    """Methods of the shapes that people write; each returns its arguments."""

    def nothing(self):
        return 'nothing'

    def only_peer(self, *, peer):
        return peer.user

    def two(self, one, two):
        return [one, two]

    def two_and_more(self, one, two, three=3):
        return [one, two, three]

    def by_name(self, *, a, b=2):
        return [a, b]

    def all_names(self, **names):
        return names

    def mixed(self, one, *, two):
        return [one, two]

    def positional(self, one, two, /):
        return [one, two]

    def scalar(self, path: str, quality: int = 5, *, secret=SECRET):
        return [path, quality, secret == SECRET]

    def optional(self, path: str = 'default', quality: int = 5):
        return [path, quality]

    def implicit(self, path: str = None, more: date = None):  # noqa: RUF013 - a common mistake
        return [path, more]

    def union(self, value: int | None):
        return value

    @zmq_method(spread=True)
    def spread(self, path, quality=5):
        return [path, quality]

    @zmq_method(spread=True)
    def spread_variadic(self, first, *rest, **names):
        return [first, rest, names]

    @logged
    def wrapped(self, one, two: int):
        return [one, two]

    @with_store
    def stored(self, store, args):
        return [store, args]

    @logged
    @with_store
    def logged_and_stored(self, store, args):
        return [store, args]

    @by_names
    def named(self, one, two):
        return [one, two]

    @lru_cache  # noqa: B019 - a handler lives as long as its process
    def cached(self, one, two):
        return [one, two]

    typed_wrapper = partialmethod(wrapped, two=2)

    async def later(self, one, two: int):
        return [one, two]

    @zmq_method(timeout=30)
    def in_thread(self, one, two):
        return [one, two]

    def with_peer(self, one, two, *, peer):
        return [one, two, peer.user]

    def with_request(self, one, two, *, request):
        return [one, two, request.method]

    part = partialmethod(two_and_more, 1)
    typed_part = partialmethod(scalar, quality=7)
    typed_function = staticmethod(partial(lambda one, two: [one, two], 1))

    # As in 2.0.0: the whole arguments
    def args(self, args):
        return args

    def old(self, path, quality=5):
        return [path, quality]

    def keyword(self, args, *, flag=True):
        return [args, flag]

    def names(self, args, **names):
        return [args, names]

    def variadic(self, first: int, *rest):
        return [first, rest]

    def old_dict(self, args: dict):
        return args

    def old_list(self, args: list) -> list:
        return args

    def old_settings(self, settings: dict[str, Any]) -> list:
        return settings

    def old_any(self, args: Any, more: Plain = None):
        return args

    def old_object(self, args: object):
        return args

    def old_optional(self, args: dict | None):
        return args

    def old_either(self, args: list[Any] | dict[str, Any]):
        return args


class Typed:
    """Methods with types; each returns the `repr` of its arguments."""

    class Kind(enum.Enum):
        ONE = 1

    def book(self, when: datetime, price: Decimal):
        return repr([when, price])

    def struct(self, book: Book):
        return repr(book)

    def dataclass(self, point: Point):
        return repr(point)

    def attrs(self, size: Size):
        return repr(size)

    def typed_dict(self, options: Options):
        return repr(options)

    def pair(self, pair: Pair):
        return repr(pair)

    def days(self, days: list[date]):
        return repr(days)

    def identifiers(self, ids: set[UUID]):
        return repr(ids)

    def counts(self, counts: dict[int, int]):
        return repr(counts)

    def colour(self, colour: Colour):
        return repr(colour)

    def literal(self, kind: Literal['a.b', "it's c.d"]):
        return repr(kind)

    def data(self, data: bytes):
        return repr(data)

    def text(self, kind: 'Kind'):
        return repr(kind)

    def number(self, number: float):
        return repr(number)

    def flag(self, *, flag: bool = False):
        return repr(flag)

    def items(self, books: list[Book]):
        return repr(books)

    def money(self, money: Money):
        return repr(money)

    def moneys(self, moneys: dict[str, Money]):
        return repr(moneys)

    def interface(self, money: IMoney):
        return repr(money)

    def holder(self, holder: Holder):
        return repr(holder)


class Framed:
    """Methods that get further frames; each returns the `repr` of its arguments."""

    def save(self, picture: bytes, when: date):
        return repr([picture, when])

    def tag(self, name: str, tags: list[str]):
        return repr([name, tags])

    def note(self, args, when: date | None = None, *, peer):
        return repr([args, when])

    def drop(self, path, peer: Peer | None = None):
        return repr([path, peer])

    def old(self, picture, request):
        return repr([picture, request])

    def mark(self, args, colour: Colour = Colour.RED, holder: Plain = None):
        return repr([args, colour, holder])


@dataclass
class Folder:
    plain: Plain
    parent: 'Folder | None' = None


class Shelf(msgspec.Struct):
    folder: Folder
    next: 'Shelf'
    money: Money


class Unusable:
    """Annotations that cannot be used."""

    def interface(self, args: INothing):
        return args

    def plain(self, args: Plain):
        return args

    def plains(self, args: list[Plain]):
        return args

    def iterable(self, args: Iterable[int]):
        return args

    def unknown(self, args: 'NotImported'):  # noqa: F821 - on purpose
        return args

    def union(self, args: date | datetime):
        return args

    def number(self, args: 5):
        return args

    def two(self, one: Plain, two: int):
        return [one, two]


class Stream:
    def __init__(self):
        self.replies = []

    def send(self, reply):
        self.replies.append(decode_reply(reply))


def ask(handler, name, args):
    """Handle one message in this thread, and return the reply."""
    stream = Stream()
    process = SimpleNamespace(owed_replies=set(), registry=Registry())
    ZMQMessageHandler(process, stream, print, handler=handler)([encode([name, args])])
    return stream.replies.pop()


@pytest.mark.parametrize(
    ('name', 'args', 'result'),
    [
        ('nothing', None, 'nothing'),
        ('nothing', [], 'nothing'),
        ('nothing', {}, 'nothing'),
        ('only_peer', None, 'anonymous'),
        ('two', [1, 2], [1, 2]),
        ('two', {'two': 2, 'one': 1}, [1, 2]),
        ('two', [None, [1]], [None, [1]]),
        ('two_and_more', [1, 2], [1, 2, 3]),
        ('two_and_more', {'one': 1, 'two': 2, 'three': 4}, [1, 2, 4]),
        ('by_name', {'a': 1}, [1, 2]),
        ('all_names', {'a': 1, 'b c': 2, '': 4}, {'a': 1, 'b c': 2, '': 4}),
        ('all_names', None, {}),
        ('mixed', {'one': 1, 'two': 2}, [1, 2]),
        ('positional', [1, 2], [1, 2]),
        ('scalar', 'x', ['x', 5, True]),
        ('scalar', ['x'], ['x', 5, True]),
        ('scalar', ['x', 6], ['x', 6, True]),
        ('scalar', {'quality': 6, 'path': 'x'}, ['x', 6, True]),
        ('optional', None, ['default', 5]),
        ('optional', {}, ['default', 5]),
        ('optional', {'quality': 6}, ['default', 6]),
        ('implicit', None, [None, None]),
        ('implicit', {'path': None, 'more': None}, [None, None]),
        ('implicit', ['x', '2026-01-02'], ['x', '2026-01-02']),
        ('union', None, None),
        ('union', [1], 1),
        ('spread', 'x', ['x', 5]),
        ('spread', None, [None, 5]),
        ('spread', ['x', 6], ['x', 6]),
        ('spread', {'path': 'x'}, ['x', 5]),
        ('spread_variadic', [1, 2, 3], [1, [2, 3], {}]),
        ('spread_variadic', {'first': 1, 'other': 2}, [1, [], {'other': 2}]),
        ('wrapped', [1, 2], [1, 2]),
        ('stored', {'a': 1}, ['store', {'a': 1}]),
        ('logged_and_stored', [1, 2], ['store', [1, 2]]),
        ('named', {'one': 1, 'two': 2}, ['GET', [1, 2]]),
        ('cached', [1, 2], [1, 2]),
        ('typed_wrapper', 1, [1, 2]),
        ('with_request', [1, 2], [1, 2, 'GET']),
        ('with_peer', [1, 2], [1, 2, 'anonymous']),
        ('part', 2, [1, 2, 3]),
        ('typed_part', 'x', ['x', 7, True]),
        ('typed_function', 2, [1, 2]),
        # As in 2.0.0
        ('args', [1, 2], [1, 2]),
        ('args', None, None),
        ('old', [1, 2], [[1, 2], 5]),
        ('old', {'path': 1, 'quality': 2}, [{'path': 1, 'quality': 2}, 5]),
        ('keyword', {'flag': False}, [{'flag': False}, True]),
        ('names', {'a': 1}, [{'a': 1}, {}]),
        ('variadic', [1, 2], [[1, 2], []]),
    ],
)
def test_shape(name, args, result):
    assert ask(Handler, name, args) == result


@pytest.mark.parametrize('args', [None, 1, 'x', [1, 2], {'a': 1}, [{'a': [None]}]])
@pytest.mark.parametrize('name', [name for name in vars(Handler) if name.startswith('old_')])
def test_annotations_of_older_handlers(name, args, caplog):
    """They are not checked: the method gets what it has got before."""
    assert ask(Handler, name, args) == args
    assert not caplog.records


TWO = 'it takes two(one, two)'
SCALAR = 'it takes scalar(path: str, quality: int = …, *, secret=…)'


@pytest.mark.parametrize(
    ('name', 'args', 'text'),
    [
        ('nothing', 1, 'too many positional arguments; it takes nothing()'),
        ('nothing', [None], 'too many positional arguments; it takes nothing()'),
        ('nothing', {'a': 1}, "got an unexpected keyword argument 'a'; it takes nothing()"),
        ('only_peer', {'peer': 'x'}, 'peer cannot be passed; it takes only_peer()'),
        ('two', None, f"missing a required argument: 'two'; {TWO}"),
        ('two', 'ab', f"missing a required argument: 'two'; {TWO}"),
        ('two', [1], f"missing a required argument: 'two'; {TWO}"),
        ('two', [1, 2, 3], f'too many positional arguments; {TWO}'),
        ('two', {'one': 1, 'two': 2, 'x': 3}, f"got an unexpected keyword argument 'x'; {TWO}"),
        ('by_name', [1], 'too many positional arguments; it takes by_name(*, a, b=…)'),
        ('all_names', {'request': 1}, 'request cannot be passed; it takes all_names('),
        ('all_names', {'self': 1, 'a': 2}, 'self cannot be passed; it takes all_names(**names)'),
        ('with_peer', {'one': 1, 'two': 2, 'peer': 3}, 'peer cannot be passed; it'),
        ('scalar', None, f"path: Expected 'str', got 'null'; {SCALAR}"),
        ('scalar', 5, f"path: Expected 'str', got 'int'; {SCALAR}"),
        ('scalar', ['x', '5'], f"quality: Expected 'int', got 'str'; {SCALAR}"),
        ('scalar', ['x', None], f"quality: Expected 'int', got 'null'; {SCALAR}"),
        ('scalar', {'x' * 5000: 1}, "missing a required argument: 'path'; it takes scalar("),
    ],
)
def test_refusal(name, args, text):
    status, reason = ask(Handler, name, args)
    assert status == 400
    assert reason.startswith(f'Bad arguments of {name!r}: {text}')
    assert SECRET not in reason


@pytest.mark.parametrize(
    ('name', 'args', 'result'),
    [
        ('book', ['2026-01-02T03:04:05', '1.5'], [MOMENT, Decimal('1.5')]),
        ('book', {'price': 2, 'when': '2026-01-02T03:04:05'}, [MOMENT, Decimal(2)]),
        ('struct', {'title': 'Ulysses'}, Book('Ulysses')),
        ('dataclass', {'x': 1, 'inner': {'x': 2}}, Point(1, Point(2))),
        ('attrs', {'width': 1}, Size(1)),
        ('typed_dict', {'quality': 1}, {'quality': 1}),
        ('pair', [1, 2], Pair(1, 2)),
        ('days', ['2026-01-02'], [date(2026, 1, 2)]),
        ('identifiers', [str(UUID(int=5))], {UUID(int=5)}),
        ('counts', {'1': 2}, {1: 2}),
        ('colour', 'red', Colour.RED),
        ('literal', 'a.b', 'a.b'),
        ('data', 'YQ==', b'a'),
        ('text', 1, Typed.Kind.ONE),
        ('number', 1, 1.0),
        ('flag', {'flag': True}, True),
        ('flag', None, False),
        ('items', [{'title': 'Ulysses'}], [Book('Ulysses')]),
        ('money', '1 EUR', Money('1 EUR')),
        ('moneys', {'a': '1 EUR'}, {'a': Money('1 EUR')}),
        ('interface', '1 EUR', Money('1 EUR')),
        ('holder', {'money': '1 EUR'}, Holder(Money('1 EUR'))),
    ],
)  # fmt: skip
def test_types(name, args, result):
    assert ask(Typed, name, args) == repr(result)


@pytest.mark.parametrize(
    ('name', 'args', 'text'),
    [
        ('book', [5, 1], "when: Expected 'datetime', got 'int'; it takes book(when: datetime, "
         'price: Decimal)'),
        ('book', {'when': '2026-01-02T03:04:05', 'price': 'x'}, 'price: Invalid decimal string; '),
        ('struct', [1], "book: Expected 'object', got 'array'; it takes struct(book: Book)"),
        ('struct', {}, "book: Object missing required field 'title'; "),
        ('struct', {'title': 1}, "book.title: Expected 'str', got 'int'; "),
        ('struct', {'title': 'x', 'pages': 0}, "book.pages: Expected 'int' >= 1; "),
        ('dataclass', {'x': 1, 'inner': {'x': '2'}}, "point.inner.x: Expected 'int', got 'str'; "),
        ('days', ['2026-01-02', 'x'], 'days[1]: Invalid RFC3339 encoded date; it takes days(days: '
         'list[date])'),
        ('counts', {'x': 1}, "counts: Expected 'int', got 'str' - at 'key' in '$'; "),
        ('items', [{'title': 'x'}, {}], "books[1]: Object missing required field 'title'; "),
        ('colour', 'x' * 5000, "colour: Invalid enum value 'xxxxx"),
        ('literal', 'c', "kind: Invalid enum value 'c'; it takes literal(kind: Literal['a.b', "
         '"it\'s c.d"])'),
        ('data', '!', 'data: Invalid base64 encoded string; '),
        ('text', 2, 'kind: Invalid enum value 2; it takes text(kind: Kind)'),
        ('flag', {'flag': 1}, "flag: Expected 'bool', got 'int'; it takes flag(*, flag: bool = …)"),
        ('money', 'refused', 'money: write a number and a currency; it takes money(money: Money)'),
        ('money', 5, "money: Expected the JSON form of 'Money'; "),
        ('moneys', {'a': 'refused'}, 'moneys[...]: write a number and a currency; '),
        ('holder', {'money': 5}, "holder.money: Expected the JSON form of 'Money'; "),
        ('holder', {'money': '1 EUR', 'plain': 5}, "holder.plain: Expected 'Plain', got 'int'; "),
        ('interface', 5, "money: Expected the JSON form of 'IMoney'; "),
    ],
)  # fmt: skip
def test_wrong_types(name, args, text):
    status, reason = ask(Typed, name, args)
    assert status == 400
    assert reason.startswith(f'Bad arguments of {name!r}: {text}')
    assert len(reason) < 500


def test_nesting_that_is_too_deep():
    """Usually the message cannot be decoded; a stack that is deep already ends here."""
    value = None
    for _ in range(100_000):
        value = {'x': 1, 'inner': value}
    method = ZMQMessageHandler(None, Stream(), print, handler=Typed).methods['dataclass']
    with pytest.raises(ZMQMessageError, match='400 .* point: it is nested too deep; it takes'):
        method.arguments.bind(value)


@pytest.mark.parametrize(
    ('name', 'args', 'reason'),
    [
        ('interface', [1], 'LookupError: INothing has no decoder, see `add_zmq_encoder`'),
        ('plain', {'a': 1}, 'LookupError: Plain has no decoder, see `add_zmq_encoder`'),
        ('plains', [1], 'LookupError: Plain has no decoder, see `add_zmq_encoder`'),
        ('iterable', [1], 'LookupError: Iterable has no decoder, see `add_zmq_encoder`'),
        ('unknown', [1], "NameError: name 'NotImported' is not defined"),
        ('union', [1], 'TypeError: Type unions may not contain more than one str-like type'),
        ('number', [1], "TypeError: Type '5' is not supported"),
    ],
)
def test_unusable_annotation(name, args, reason, caplog):
    assert ask(Unusable, name, args) == args
    messages = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    [message] = [each for each in messages if f'.{name}:' in each]
    assert message.startswith(
        f"Unusable.{name}: values of 'args' are not converted, because its annotation cannot be "
        f'used ({reason}'
    )


def test_fields_that_cannot_be_made(caplog):
    class Library:
        def add(self, shelf: Shelf):
            return 'added'

    assert ask(Library, 'add', {'folder': {'plain': 1}})[0] == 400
    assert [record.getMessage() for record in caplog.records] == [
        'Library.add: each message is refused, because Plain has no decoder, see '
        '`add_zmq_encoder` (shelf.folder.plain)',
    ]


class Careless:
    """The asterisk in front of `peer` was forgotten."""

    def remove(self, path: str, peer: Peer | None = None):
        return [path, peer]

    def move(self, path, request):
        return [path, request]

    def first(self, request: str, path='x'):
        return [request, path]


PEER = ['admin', '127.0.0.1']


@pytest.mark.parametrize(
    ('name', 'args', 'text'),
    [
        ('remove', ['x', PEER], 'peer cannot be passed; it takes remove('),
        ('remove', {'path': 'x', 'peer': PEER}, 'peer cannot be passed; it takes remove('),
        ('move', ['x', PEER], 'request cannot be passed; it takes move('),
    ],
)
def test_a_message_does_not_pass_the_peer(name, args, text):
    status, reason = ask(Careless, name, args)
    assert status == 400
    assert reason.startswith(f'Bad arguments of {name!r}: {text}')


def test_forgotten_asterisk(caplog):
    assert ask(Careless, 'remove', ['x']) == ['x', None]
    assert ask(Careless, 'first', {'request': 'a', 'path': 'b'}) == ['a', 'b']
    messages = {record.getMessage() for record in caplog.records}
    text = 'to get that of the message, write it behind `*`'
    assert messages == {
        f'Careless.remove: a message of one frame cannot pass peer; {text}',
        f'Careless.move: a message of one frame cannot pass request; {text}',
    }


def ask_in_frames(name, *frames):
    stream = Stream()
    ZMQMessageHandler(SimpleNamespace(), stream, print, handler=Framed)(
        [*frames[:-1], encode([name, frames[-1]])]
    )
    return stream.replies.pop()


@pytest.mark.parametrize(
    ('name', 'frames', 'result'),
    [
        ('save', [b'x', '2026-01-02'], [b'x', date(2026, 1, 2)]),
        ('note', [b'x', '2026-01-02'], [b'x', date(2026, 1, 2)]),
        ('note', [b'x', None], [b'x', None]),
        ('mark', [b'x', 'red'], [b'x', Colour.RED, None]),
        ('mark', ['red'], ['red', Colour.RED, None]),
        ('old', [b'x', 5], [b'x', 5]),
    ],
)
def test_frames_are_converted(name, frames, result):
    assert ask_in_frames(name, *frames) == repr(result)


@pytest.mark.parametrize(
    ('name', 'frames', 'text'),
    [
        ('save', [b'x', 5], "when: Expected 'date', got 'int'; it takes save(picture: bytes, "),
        ('tag', [b'x', ['a']], "name: Expected 'str', got 'bytes'; it takes tag(name: str, "),
        ('note', [b'x', {}], "when: Expected 'date | null', got 'object'; it takes note("),
        ('mark', [b'x', b'red', 5], "colour: Expected 'str', got 'bytes'; it takes mark("),
        ('drop', [b'x', ['admin', '']], 'peer cannot be passed; it takes drop('),
        ('mark', [b'x', 'blue'], "colour: Invalid enum value 'blue'; it takes mark("),
    ],
)
def test_a_further_frame_does_not_avoid_the_check(name, frames, text):
    """A peer chooses how many frames it sends; the method relies on its annotations."""
    status, reason = ask_in_frames(name, *frames)
    assert status == 400
    assert reason.startswith(f'Bad arguments of {name!r}: {text}')


def test_other_parameters_are_still_converted():
    assert ask(Unusable, 'two', [{'a': 1}, 2]) == [{'a': 1}, 2]
    assert ask(Unusable, 'two', [{'a': 1}, 'x'])[0] == 400


def test_annotations_that_are_texts(caplog):
    """As in a module with ``from __future__ import annotations``."""
    handler = arguments_of_text.Handler
    assert ask(handler, 'book', ['2026-01-02', '1.5']) == '1.5 of 2026-01-02'
    assert ask(handler, 'settings', [1]) == [1]
    assert ask(handler, 'nested', 'a') == 'ONE'
    assert ask(handler, 'nested', 'b')[1].endswith('; it takes nested(kind: Kind)')
    assert not caplog.records
    assert ask(handler, 'book', [1, 2]) == [
        400,
        "Bad arguments of 'book': day: Expected 'date', got 'int'; it takes book(day: date, "
        'price: Decimal | None)',
    ]


def test_failing_decoder_is_in_the_log(caplog):
    caplog.set_level(logging.DEBUG, 'PyAMS (zmq)')
    assert ask(Typed, 'money', 5)[0] == 400
    [record] = [each for each in caplog.records if each.exc_info]
    assert record.getMessage() == 'The decoder of Money has failed'
    assert record.levelname == 'DEBUG'


class ShapesMessageHandler(ZMQMessageHandler):
    handler = Handler


@pytest.mark.parametrize('concurrency', [1, 2])
def test_in_a_process(start, concurrency):
    factory = type('Shapes', (Process,), {'concurrency': concurrency})
    process = start(handler=ShapesMessageHandler, factory=factory)
    with ZMQClient(process.bound_address) as client:
        for name in ('two', 'later', 'in_thread'):
            assert client.call(name, {'one': date(2026, 1, 2), 'two': 2}) == ['2026-01-02', 2]
            with pytest.raises(ZMQRemoteError, match='400 Bad arguments of .* it takes'):
                client.call(name, [1])
        assert client.call('with_peer', [1, 2]) == [1, 2, 'anonymous']
        assert client.call('nothing') == 'nothing'
        assert client.request(['scalar', 'x']) == ['x', 5, True]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from('one two three path quality a b x title peer self args'.split())
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
TEXTS = st.characters(codec='utf-8')
SHAPES = [
    (cls, name)
    for cls in (Handler, Typed, Unusable)
    for name, value in vars(cls).items()
    if not name.startswith('_')
    and not isinstance(value, type)
    and name not in ('later', 'in_thread')
    and name not in ('named', 'cached')  # their decorators fail for other arguments
]


@given(st.sampled_from(SHAPES), JSON)
def test_any_arguments(shape, args):
    """They are either accepted or refused, and never fail."""
    try:
        data = encode([shape[1], args])
    except ValueError:  # a lone surrogate
        return
    stream = Stream()
    process = SimpleNamespace(owed_replies=set(), registry=Registry())
    ZMQMessageHandler(process, stream, print, handler=shape[0])([data])
    reply = stream.replies.pop()
    if isinstance(reply, list) and len(reply) == 2 and reply[0] == 400:
        assert 'it takes' in str(reply[1])
    else:
        assert not str(reply).startswith('[500, ')
