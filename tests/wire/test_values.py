# SPDX-License-Identifier: ZPL-2.1
"""The JSON form of values: native types, `__json__`, encoders of the application, and errors."""

import enum
import math
import subprocess
import sys
import uuid
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace

import attrs
import msgspec
import pytest
from freezegun import freeze_time
from hypothesis import given
from hypothesis import strategies as st
from pyramid.threadlocal import manager
from zope.interface import Interface, implementer

from pyams_zmq.message import add_encoder, decode_reply, encode
from pyams_zmq.wire.values import find_decoder

UTC = timezone.utc
SECRET = 'the secret of the value'


class Colour(enum.Enum):
    RED = 'red'


class Meta(enum.EnumMeta):
    """A metaclass that msgspec does not know."""


class Odd(enum.Enum, metaclass=Meta):
    ONE = 1


@dataclass
class Point:
    x: int
    label: object = None


@attrs.define
class Size:
    width: int


class Book(msgspec.Struct):
    title: str


class Day(date):
    """A subclass of a type that msgspec encodes."""


class Moment(datetime):
    """The same."""


class Hour(time):
    """The same."""


class Duration(timedelta):
    """The same."""


class Price(Decimal):
    """The same."""


class Cover(bytes):
    """The same."""


class Buffer(bytearray):
    """The same."""


class Page:
    """Encodes itself, as for the JSON renderer of Pyramid."""

    def __init__(self, number):
        self.number = number

    def __json__(self, request):
        return {'page': self.number, 'method': request and request.method}


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 6, UTC), '2026-01-02T03:04:05.000006Z'),
        (date(2026, 1, 2), '2026-01-02'),
        (time(3, 4), '03:04:00'),
        (timedelta(days=1, seconds=2), 'P1DT2S'),
        (uuid.UUID(int=5), '00000000-0000-0000-0000-000000000005'),
        (Decimal('1.50'), '1.50'),
        (Colour.RED, 'red'),
        (Odd.ONE, 1),
        ({1}, [1]),
        (frozenset({1}), [1]),
        (b'\xff\xd8', '/9g='),
        (Point(1, [b'a', Colour.RED]), {'x': 1, 'label': ['YQ==', 'red']}),
        (Size(2), {'width': 2}),
        (Book('Ulysses'), {'title': 'Ulysses'}),
        (Moment(2026, 1, 2, 3, tzinfo=UTC, fold=1), '2026-01-02T03:00:00Z'),
        (Day(2026, 1, 2), '2026-01-02'),
        (Hour(3, 4, 5, 6, UTC), '03:04:05.000006Z'),
        (Duration(days=1), 'P1D'),
        (Price('1.50'), '1.50'),
        ([Cover(b'a'), Buffer(b'a')], ['YQ==', 'YQ==']),
        (Page(1), {'page': 1, 'method': None}),
        ({date(2026, 1, 2): 1, Decimal('1.5'): 2}, {'2026-01-02': 1, '1.5': 2}),
        (math.nan, None),
    ],
)
def test_native(value, expected):
    assert decode_reply(encode([200, value])) == [200, expected]


def test_frozen_time():
    """The classes of freezegun are subclasses, and replace those of the modules."""
    with freeze_time('2026-01-02 03:04:05'):
        now = [datetime.now(), datetime.now(UTC), date.today()]  # noqa: DTZ005, DTZ011 - naive, too
        assert decode_reply(encode(now)) == [
            '2026-01-02T03:04:05',
            '2026-01-02T03:04:05Z',
            '2026-01-02',
        ]


VALUES = {
    datetime: st.datetimes(timezones=st.none() | st.just(UTC)),
    date: st.dates(),
    time: st.times(),
    timedelta: st.timedeltas(),
    Decimal: st.decimals(allow_nan=False, allow_infinity=False),
    uuid.UUID: st.uuids(),
    bytes: st.binary(),
    set[int]: st.sets(st.integers()),
    dict[date, list[Decimal]]: st.dictionaries(
        st.dates(), st.lists(st.decimals(allow_nan=False, allow_infinity=False))
    ),
    Point: st.builds(Point, st.integers()),
}


@given(st.data())
@pytest.mark.parametrize('kind', VALUES)
def test_round_trip(kind, data):
    value = data.draw(VALUES[kind])
    assert msgspec.convert(decode_reply(encode(value)), kind, str_keys=True) == value


def test_request_of_the_thread():
    manager.push({'request': SimpleNamespace(method='POST'), 'registry': None})
    try:
        assert decode_reply(encode(Page(1))) == {'page': 1, 'method': 'POST'}
    finally:
        manager.pop()


def test_without_pyramid(monkeypatch):
    monkeypatch.delitem(sys.modules, 'pyramid.threadlocal')
    assert decode_reply(encode(Page(1))) == {'page': 1, 'method': None}


# Encoders of the application


class Shape:
    """Has an encoder."""

    def __init__(self, sides):
        self.sides = sides


class Square(Shape):
    """Uses the encoder of its base class."""

    def __init__(self):
        super().__init__(4)


class Circle(Shape):
    """Has its own."""


class IShelf(Interface):
    """A shelf."""


@implementer(IShelf)
class Shelf:
    """Uses the encoder of its interface."""

    books = (Book('Ulysses'), Square())


class Label(str):
    """Is encoded by an encoder, although a str has a JSON form."""

    __slots__ = ()


class Rendered(str):
    """Is encoded as a str, as by the JSON renderer of Pyramid."""

    __slots__ = ()

    def __json__(self, request):
        raise LookupError


@pytest.fixture(scope='module', autouse=True)
def _encoders():
    """Add encoders, which stay: nobody else has these classes."""
    add_encoder(Shape, lambda value: {'sides': value.sides}, lambda data: Shape(data['sides']))
    add_encoder(Circle, lambda value: 'replaced')
    add_encoder(Circle, lambda value: 'circle')
    add_encoder(IShelf, lambda value: value.books)
    add_encoder(Label, lambda value: {'label': str.__str__(value)})


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (Shape(3), {'sides': 3}),
        (Square(), {'sides': 4}),
        (Circle(0), 'circle'),
        (Shelf(), [{'title': 'Ulysses'}, {'sides': 4}]),
        (Point(1, Shape(3)), {'x': 1, 'label': {'sides': 3}}),
        ({Circle(0): 1}, {'circle': 1}),
        (Label('a'), {'label': 'a'}),
        (Rendered('a'), 'a'),
    ],
)
def test_encoder(value, expected):
    assert decode_reply(encode([200, value])) == [200, expected]


def test_decoder():
    assert find_decoder(Shape)({'sides': 3}).sides == 3
    assert find_decoder(Circle) is None  # its encoder has none
    assert find_decoder(Square) is None  # that of the base class would make another object
    assert find_decoder(IShelf) is None
    assert find_decoder(int) is None
    assert find_decoder(list[int]) is None


@pytest.mark.parametrize(
    'cls',
    [
        str, int, float, bool, type(None), bytes, bytearray, memoryview, dict, list, tuple, set,
        frozenset, datetime, date, time, timedelta, Decimal, uuid.UUID, msgspec.Raw, enum.Enum,
        type('Records', (list,), {}), type('Names', (dict,), {}), Colour, Point, Size, Book,
    ],
)  # fmt: skip
def test_encoder_of_a_native_type(cls):
    with pytest.raises(ValueError, match='cannot have an encoder: its instances are encoded alr'):
        add_encoder(cls, str)


@pytest.mark.parametrize(
    ('args', 'text'),
    [
        (('Shape', str), "Bad type 'Shape': write a class or an interface"),
        ((Shape(3), str), 'Bad type <'),
        ((list[int], str), 'Bad type list'),
        ((Shape, None), 'Bad encoder or decoder None'),
        ((Shape, 'str'), "Bad encoder or decoder 'str'"),
        ((Shape, str, 'str'), "Bad encoder or decoder 'str'"),
    ],
)
def test_bad_encoder(args, text):
    with pytest.raises(TypeError) as error:
        add_encoder(*args)
    assert str(error.value).startswith(text)


# Errors: the type and the place, never the value


class Secret:
    """Has no JSON form."""

    def __repr__(self):
        return SECRET


class Failing(Secret):
    """Has one that fails."""

    def __json__(self, request):
        raise KeyError(SECRET)


class FailingEncoder(Secret):
    """Has an encoder that fails."""


class FailingAttribute(Secret):
    """Cannot be asked for `__json__`."""

    def __getattribute__(self, name):
        if name == '__json__':
            raise OSError(SECRET)
        return super().__getattribute__(name)


add_encoder(FailingEncoder, lambda value: 1 / 0)
REMEDY = (
    'has no JSON form: give the class a method `__json__(request)`, or register an encoder with '
    '`add_zmq_encoder`'
)


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (Secret(), f'Secret {REMEDY} (at $)'),
        ([200, Secret()], f'Secret {REMEDY} (at $[1])'),
        (('x', {'a': [1, {'b': Secret()}]}), f'Secret {REMEDY} (at $[1].a[1].b)'),
        ({'the key': [Secret()]}, f'Secret {REMEDY} (at $[...][0])'),
        ({'k' * 41: Secret()}, f'Secret {REMEDY} (at $[...])'),
        ({1: Secret()}, f'Secret {REMEDY} (at $[...])'),
        ([{Secret(): 1}], f'Secret {REMEDY} (a key of $[0])'),
        ([{'a': {(SECRET,): 1}}], 'A key of type tuple has no JSON form (a key of $[0].a)'),
        ([Point(1, Secret())], f'Secret {REMEDY}'),
        ([Page(Secret())], f'Secret {REMEDY}'),
        ([Page], f'type {REMEDY} (at $[0])'),
        ([Failing()], 'The method __json__ of Failing has raised KeyError (at $[0])'),
        (
            [FailingEncoder()],
            'The encoder of FailingEncoder has raised ZeroDivisionError (at $[0])',
        ),
        (
            [FailingAttribute()],
            'The encoder of FailingAttribute has raised OSError (at $[0])',
        ),
        ({'a': [SECRET, f'{SECRET}\ud800']}, 'A string with a lone surrogate'),
        ([{f'{SECRET}\ud800': 1}], 'A string with a lone surrogate'),
        ([Point(1, f'{SECRET}\ud800')], 'A string with a lone surrogate'),
        (memoryview(b'bytes')[::2], 'A memoryview that is not contiguous has no JSON form'),
    ],
)
def test_error(value, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        encode(value)
    assert str(caught.value).startswith(text)
    error = caught.value
    assert SECRET not in repr(error)
    assert error.__context__ is None
    assert not hasattr(error, 'value')


def test_place_of_a_lone_surrogate():
    with pytest.raises(ValueError, match=r'lone surrogate has no JSON form \(at \$\.a\[1\]\)$'):
        encode({'a': ['', '\ud800']})
    with pytest.raises(ValueError, match=r'lone surrogate has no JSON form \(a key of \$\[0\]\)$'):
        encode([{'\ud800': 1}])


def test_cause_of_a_failing_encoder():
    with pytest.raises(TypeError) as caught:
        encode(Failing())
    assert isinstance(caught.value.__cause__, KeyError)


def test_place_in_a_cycle():
    cycle = [[]]
    cycle[0].append(cycle)
    with pytest.raises(RecursionError):
        encode(cycle)
    shared = [1]
    with pytest.raises(TypeError, match=r'\(at \$\[2\]\)$'):
        encode([shared, shared, Secret()])


class Endless:
    """Its JSON form contains another one."""

    def __json__(self, request):
        return [Endless()]


class Recursive:
    """Recurses in Python."""

    def __json__(self, request):
        return self.__json__(request)


@pytest.mark.parametrize('value', [Endless(), Recursive()])
def test_endless(value):
    with pytest.raises(RecursionError):
        encode([value])
    assert encode([1]) == b'[1]'


CHANGED = """
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import attrs
import msgspec
from pyams_zmq.message import encode

class Changing:
    def __json__(self, request):
        value.clear()
        return 0

class Outer:
    def __json__(self, request):
        return value

@dataclass
class Record:
    items: object

@attrs.define
class Slotted:
    items: object

class Struct(msgspec.Struct, frozen=True):
    items: object

value = [Changing(), *[[str(number) * 9] for number in range(100_000)]]
whole = {'list': value, 'dict': {0: value}, 'form': Outer(), 'dataclass': Record(value),
         'attrs': Slotted([Record(value)]), 'struct': Struct((value,))}
if sys.argv[1] == 'changed dict':
    value = whole['changed dict'] = dict(enumerate(value))
print(encode([whole[sys.argv[1]]]).count(b'000000000'))
"""


@pytest.mark.parametrize(
    'kind', ['list', 'dict', 'changed dict', 'form', 'dataclass', 'attrs', 'struct']
)
def test_change_while_it_is_encoded(kind):
    """As by another thread. In a program of its own: msgspec would read memory that was freed."""
    program = [sys.executable, '-c', CHANGED, kind]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1


class Failure(Exception):
    """As a dataclass, it cannot be copied."""


@attrs.define(slots=False)
class Base:
    width: int


@attrs.define
class Derived(Base):
    height: int = 2
    other: object = attrs.field(init=False)


class Named(msgspec.Struct, rename='camel', tag='named', omit_defaults=True):
    first_name: str
    last_name: str = 'x'


@pytest.mark.parametrize(
    'value',
    [
        Point(1, [Point(2)]),
        Derived(1),
        Named('a'),
        Named('a', {'b': Named('c', 'd')}),
        [Size(1), (2,), {'a': {1}}, frozenset({2})],
        dataclass(Failure)(),
    ],
)
def test_copy_has_the_same_form(value):
    """It is made because of the other value."""
    other = SimpleNamespace(__json__=lambda request: None)
    assert encode([value, other]) == encode([value])[:-1] + b',null]'
