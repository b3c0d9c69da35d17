# SPDX-License-Identifier: ZPL-2.1
"""Encoding and decoding of messages and replies."""

import enum
import json
import math
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyams_zmq.exceptions import ZMQMessageError, ZMQReplyError
from pyams_zmq.message import decode_reply, decode_request, encode
from pyams_zmq.wire.message import (
    MAX_OPTIONS,
    MAX_OPTIONS_SIZE,
    check_integer,
    encode_request,
    is_error,
    peek_type,
)

GOOD_JSON = [
    # JSON, value
    (b'1', 1),
    (b' [ 1 ] \r\n\t', [1]),
    (b'-0.0', -0.0),
    (b'1e5', 100_000.0),
    (b'1e-400', 0.0),
    (b'1180591620717411303424', 2**70),
    (b'1' * 4000, int('1' * 4000)),
    (b'{"a":1,"b":3,"a":2}', {'a': 2, 'b': 3}),
    (rb'"\ud83d\ude00\u0000\/"', '😀\0/'),
    ('"é\u2028😀"'.encode(), 'é\u2028😀'),
    (b'[' * 300 + b']' * 300, None),
]

BAD_JSON = [
    b'',
    b' ',
    b'\0',
    b'nul',
    b'None',
    b'True',
    b"'a'",
    b'"a',
    b'[1,]',
    b'[1 2]',
    b'{"a":1,}',
    b'{1:1}',
    b'{"a"}',
    b'// comment\n1',
    b'1 1',
    b'1\0',
    b'1}',
    b'01',
    b'+1',
    b'.5',
    b'1.',
    b'0x1',
    b'NaN',
    b'Infinity',
    b'-Infinity',
    b'1e999',
    b'-1e999',
    b'1' * 5000,
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'\xff',
    b'"\t"',
    rb'"\x"',
    rb'"\ud800"',
    rb'"\ud800 and more"',
    rb'"\udc00\ud800"',
    b'\xef\xbb\xbf1',
    '1'.encode('utf-16'),
    b'[' * 100_000,
    b'[' * 100_000 + b']' * 100_000,
    b'{"a":' * 100_000 + b'1' + b'}' * 100_000,
]

BAD_REQUESTS = [
    # JSON, but not a request
    b'1',
    b'"echo"',
    b'null',
    b'true',
    b'{"echo":1}',
    b'[]',
    b'["echo"]',
    b'["echo",1,{},1]',
    b'["echo",1,{"later":NaN}]',
    b'["echo",1,{"later":"\xff"}]',
    rb'["echo",1,{"later":"\ud800"}]',
    b'["echo",1,{"later":' + b'[' * 100_000 + b']' * 100_000 + b'}]',
    b'["echo",1,{"later":1}',
    b'[1,1,{"deadline":1}]',
    b'[1,1]',
    b'[null,1]',
    b'[["echo"],1]',
]


@pytest.mark.parametrize(('data', 'value'), GOOD_JSON)
def test_good_json(data, value):
    if value is None:
        value = json.loads(data)
    assert decode_request(b'["echo",' + data + b']') == ('echo', value)
    assert decode_reply(data) == value


@pytest.mark.parametrize('data', BAD_JSON, ids=lambda data: repr(data[:30]))
def test_bad_json(data):
    with pytest.raises(ZMQMessageError, match=r'^400 Bad message, expected') as caught:
        decode_request(b'["echo",' + data + b']')
    assert len(caught.value.text) < 250
    with pytest.raises(ZMQReplyError, match=r'^The reply is not JSON'):
        decode_reply(data)


@pytest.mark.parametrize('data', BAD_JSON + BAD_REQUESTS, ids=lambda data: repr(data[:30]))
def test_bad_request(data):
    with pytest.raises(ZMQMessageError, match=r'^400 Bad message, expected') as caught:
        decode_request(data)
    assert len(caught.value.text) < 250
    assert caught.value.__cause__ is None


# Options of a request: those of later clients are ignored

FUTURE = 4e9


def decode_with(options):
    """Decode a request with options; return its arguments, or the error."""
    data = options if isinstance(options, bytes) else json.dumps(options).encode()
    try:
        name, args = decode_request(b'["echo",[1],' + data + b']')
    except ZMQMessageError as error:
        return error
    assert name == 'echo'
    return args


@pytest.mark.parametrize(
    'options',
    [
        None,
        {},
        {'deadline': FUTURE},
        {'deadline': int(FUTURE)},
        {'deadline': 10**30},
        {'later': None},
        {'deadline': FUTURE, 'later': {'deadline': [None, {'deadline': 'x'}]}},
        {str(number): number for number in range(20)},
        {'Deadline': 'x', 'deadline ': 1},
        {'later': 'x' * 4000},
        b' { } ',
        b' ' * 4097 + b'{}',  # blanks between elements do not count
        b'{"later":1,"later":2}',
        b'{"deadline":1,"deadline":4e9}',
    ],
)
def test_good_options(options):
    assert decode_with(options) == [1]


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        ([], 'its options are not an object'),
        (0, 'its options are not an object'),
        (2, 'its options are not an object'),
        ('', 'its options are not an object'),
        (False, 'its options are not an object'),
        ({'deadline': None}, 'its option deadline is not a number'),
        ({'deadline': True}, 'its option deadline is not a number'),
        ({'deadline': '1'}, 'its option deadline is not a number'),
        ({'deadline': [FUTURE], 'later': 1}, 'its option deadline is not a number'),
        ({str(number): number for number in range(21)}, 'it has 21 options; the limit is 20'),
        ({'later': 'x' * 4096}, 'its options have more than 4096 bytes'),
        ({'x' * 4096: 1, 'deadline': FUTURE}, 'its options have more than 4096 bytes'),
        (b'{' + b','.join([b'"a":1'] * 1000) + b'}', 'its options have more than 4096 bytes'),
        (b'{' + b' ' * 4095 + b'}', 'its options have more than 4096 bytes'),
        (b'{"a":"' + b'\\u0000' * 700 + b'"}', 'its options have more than 4096 bytes'),
    ],
)
def test_bad_options(options, text):
    error = decode_with(options)
    assert (error.status, error.text.startswith(f'Bad message: {text}')) == (400, True)
    assert error.__cause__ is None


@pytest.mark.parametrize('deadline', [1, 1.5, -1e300, -(10**30), 0])
def test_deadline_that_has_passed(deadline):
    error = decode_with({'deadline': deadline, 'later': []})
    assert (error.status, error.text) == (504, 'The deadline of the message has passed')


def test_size_of_the_arguments_does_not_count():
    data = json.dumps(['echo', 'x' * 100_000, {'deadline': FUTURE}]).encode()
    assert decode_request(data) == ('echo', 'x' * 100_000)


OPTION_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda values: (
        st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=9), values, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.text(max_size=20).filter(lambda key: key != 'deadline'), OPTION_VALUES, max_size=25
    )
)
def test_any_options_of_later_clients(options):
    """They change nothing, up to the limits."""
    size = len(json.dumps(options).encode())
    result = decode_with(options)
    if len(options) > MAX_OPTIONS:
        assert result.status == 400
    elif size <= MAX_OPTIONS_SIZE:
        assert result == [1]
    else:
        assert 'options have more' in result.text
    if len(options) < MAX_OPTIONS and size < MAX_OPTIONS_SIZE - 20:
        assert decode_with({**options, 'deadline': 1}).status == 504


@given(OPTION_VALUES)
def test_any_deadline(value):
    result = decode_with({'deadline': value})
    if type(value) not in {int, float}:
        assert result.status == 400
        assert 'deadline' in result.text
    elif value < time.time():
        assert result.status == 504
    else:
        assert result == [1]


class Number(enum.IntEnum):
    """An integer with another `repr`."""

    ONE = 1


class Text(str):
    """A subclass of str, as a translation string is."""

    __slots__ = ()


class Mapping(dict):
    """A subclass of dict."""


class Sequence(list):
    """A subclass of list."""


ENCODED = [
    # value, what a peer reads
    (None, None),
    ([200, None], [200, None]),
    ((200, ('OK',)), [200, ['OK']]),
    (2**70, 2**70),
    (-(2**70), -(2**70)),
    (Text('text'), 'text'),
    ([200, {'a': Text('text')}], [200, {'a': 'text'}]),
    ({Text('key'): 1}, {'key': 1}),
    (Mapping(a=Sequence([1])), {'a': [1]}),
    (Number.ONE, 1),
    ([Number.ONE, 1.5], [1, 1.5]),
    ({1: 2, 1.5: 3, None: 4}, {'1': 2, '1.5': 3, 'null': 4}),
    ('é\u2028😀', 'é\u2028😀'),
    ({True: 1, False: 2}, {'true': 1, 'false': 2}),
    ({Number.ONE: 1, 2**70: 2}, {'1': 1, '1180591620717411303424': 2}),
    (math.nan, None),
    ([1, {'x': -math.inf}], [1, {'x': None}]),
]

NOT_ENCODABLE = [
    object(),
    [200, frozenset({1j})],
    1j,
    Ellipsis,
    ValueError('text'),
    int,
    iter([1]),
    (i for i in range(3)),
    {(1, 2): 3},
    {frozenset(): 1},
    memoryview(b'bytes')[::2],
    '\ud800',
    ['\ud800'],
    {'\ud800': 1},
    [Text('\ud800')],
    10**5000,
]


@pytest.mark.parametrize(('value', 'expected'), ENCODED)
def test_encode(value, expected):
    assert decode_reply(encode(value)) == expected


@pytest.mark.parametrize('value', NOT_ENCODABLE, ids=lambda value: type(value).__name__)
def test_not_encodable(value):
    with pytest.raises((TypeError, ValueError)):
        encode(value)


@pytest.mark.parametrize('kind', [list, dict, Sequence])
def test_cycle(kind):
    value = kind()
    if kind is dict:
        value['a'] = value
    else:
        value.append(value)
    with pytest.raises((ValueError, RecursionError)):
        encode(value)


@pytest.mark.parametrize('innermost', [[], [Text('text')], [object()]])
def test_too_deep(innermost):
    for _ in range(100_000):
        innermost = [innermost]
    with pytest.raises(RecursionError):
        encode(innermost)


@pytest.mark.parametrize('wrap', [lambda value: [value], lambda value: {'a': value}])
def test_deep(wrap):
    # As deep as the standard library goes, 500 of the 1 000 levels that Python allows itself.
    value = 'text'
    for _ in range(500):
        value = wrap(value)
    assert json.loads(encode(value)) == value


TEXTS = st.text(st.characters(codec='utf-8'))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS
)
PLAIN = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(TEXTS, inner)), max_leaves=20
)
ODD = st.recursive(
    st.one_of(
        SCALARS,
        st.floats(),
        st.text(),
        st.binary(),
        st.sets(st.integers()),
        st.complex_numbers(),
        st.builds(Text, st.text()),
        st.sampled_from(Number),
        st.builds(object),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.lists(inner).map(Sequence),
        st.dictionaries(st.one_of(st.text(), st.integers(), st.floats(), st.none()), inner),
    ),
    max_leaves=20,
)


def strict_json(data):
    """Decode JSON with the standard library, without its extensions."""

    def refuse(constant):
        raise ValueError(constant)

    def finite(text):
        if math.isinf(float(text)):
            raise ValueError(text)
        return float(text)

    value = json.loads(data.decode(), parse_constant=refuse, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
    return value


@given(PLAIN)
def test_plain_values_round_trip(value):
    data = encode(value)
    assert strict_json(data) == value
    assert strict_json(data) == json.loads(json.dumps(value))
    assert decode_reply(data) == value
    assert decode_request(b'["x",' + data + b']') == ('x', value)


@given(ODD)
def test_what_is_encoded_is_json(value):
    try:
        data = encode(value)
    except (TypeError, ValueError):
        return
    assert decode_reply(data) == strict_json(data)


@given(st.binary(max_size=60))
@example(b'["a",1]')
@example(b'["\\ud800",1]')
def test_decodes_what_the_standard_library_decodes(data):
    compare(data)


@given(PLAIN, st.data())
def test_decodes_mutations_as_the_standard_library(value, data):
    encoded = bytearray(encode(['x', value]))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(encoded)))
        end = data.draw(st.integers(start, min(len(encoded), start + 2)))
        encoded[start:end] = data.draw(
            st.one_of(
                st.binary(max_size=2), st.sampled_from([b'"', b'\\u', b'[', b'}', b',', b'e'])
            )
        )
    compare(bytes(encoded))


def compare(data):
    try:
        expected = strict_json(data)
    except ValueError:
        with pytest.raises(ZMQReplyError):
            decode_reply(data)
        with pytest.raises(ZMQMessageError):
            decode_request(data)
        return
    assert decode_reply(data) == expected
    match expected:
        case [str(), _]:
            assert decode_request(data) == tuple(expected)
        case _:
            with pytest.raises(ZMQMessageError):
                decode_request(data)


@pytest.mark.parametrize(
    ('data', 'name'),
    [
        (b'["echo",1]', b'echo'),
        (b' [ "pyams_zmq.stats", null]', b'pyams_zmq.stats'),
        (b'["ech\\u006f",1]', b''),
        (b'{"echo":1}', b''),
        (b'', b''),
        (b'["' + b'x' * 101 + b'"]', b''),
        (b'x["echo",1]', b''),
        ('["é"]'.encode(), b''),
    ],
)
def test_peek_type(data, name):
    assert peek_type(data) == name
    assert peek_type(memoryview(data)) == name


@pytest.mark.parametrize('reply', [b'[500,"x"]', b' [ 404 , 1]'])
def test_is_error(reply):
    assert is_error(reply)


@pytest.mark.parametrize(
    'reply', [b'[45,"x"]', b'[4000,1]', b'[503]', b'"text"', b'', b'[200,[500]]']
)
def test_is_not_error(reply):
    assert not is_error(reply)


@pytest.mark.parametrize('value', [True, 0, -1, 1.0, '1', None])
def test_check_integer(value):
    assert check_integer('retries', 1, 1) == 1
    text = re.escape(f'Bad retries {value!r}: write an integer')
    with pytest.raises(ValueError, match=f'{text}, 1 or more'):
        check_integer('retries', value, 1)
    with pytest.raises(ValueError, match=f'{text} from 1 to 9'):
        check_integer('retries', value, 1, 9)


def test_check_integer_with_a_maximum():
    assert check_integer('retries', 9, 1, 9) == 9
    with pytest.raises(ValueError, match='Bad retries 10: write an integer from 1 to 9'):
        check_integer('retries', 10, 1, 9)


@pytest.mark.parametrize('options', [{}, {'traceparent': 'x'}])
def test_deadline_beside_other_options(options):
    _name, _args, found = decode_reply(encode_request(['echo', 1, options], 5))
    assert found.pop('deadline') > 0
    assert found == options


@pytest.mark.parametrize('options', [{'id': 'a job'}, {'deadline': 5}, None])
def test_options_that_keep_their_deadline(options):
    assert decode_reply(encode_request(['echo', 1, options], 5)) == ['echo', 1, options]
