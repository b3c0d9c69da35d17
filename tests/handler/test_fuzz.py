# SPDX-License-Identifier: ZPL-2.1
"""Generated messages to a real process: each gets one reply, and the next message is handled."""

import json

import pytest
import zmq
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from handlers import FuzzMessageHandler
from messages import ERROR, Dealer, call

TEXTS = st.text(st.characters(codec='utf-8'), max_size=20)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(TEXTS, inner, max_size=5)),
    max_leaves=10,
)
NAMES = st.one_of(
    st.sampled_from(['echo', 'async_echo', 'many', 'fail', '__init__', 'process', 'mro', '']), TEXTS
)
REQUESTS = st.one_of(
    st.tuples(NAMES, VALUES), VALUES, st.lists(st.one_of(NAMES, VALUES), max_size=4)
).map(lambda value: json.dumps(value, ensure_ascii=False).encode())
TOKENS = st.sampled_from(
    [b'"', b'\\', b'\\ud800', b'[', b']', b'{', b'}', b',', b':', b'-', b'1e999', b'NaN', b'null',
     b'\0', b'\xff', b'\xc3', b'\xed\xa0\x80', b'\xef\xbb\xbf', b' ', b'\n', b'9' * 400, b'[' * 999]
)  # fmt: skip


@st.composite
def mutations(draw):
    """A valid request with a few bytes replaced, added or removed."""
    data = bytearray(draw(REQUESTS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 3)))
        data[start:end] = draw(st.one_of(TOKENS, st.binary(max_size=3)))
    return bytes(data)


FRAMES = st.one_of(REQUESTS, mutations(), st.binary(max_size=40))
BODIES = st.one_of(
    FRAMES.map(lambda frame: [frame]), st.lists(FRAMES, max_size=4), st.just([b''] * 50)
)
MESSAGES = st.one_of(
    BODIES.map(lambda body: [b'', *body]),
    st.tuples(st.lists(st.binary(max_size=5), max_size=3), BODIES).map(
        lambda parts: [*parts[0], b'', *parts[1]]
    ),
    st.lists(st.one_of(st.binary(max_size=5), FRAMES), min_size=1, max_size=5),
)


def is_allowed(reply):
    """Return True if FuzzHandler, or the process itself, may send this reply."""
    match reply:
        case [200, _]:
            return True
        case [400 | 404, str(text)]:
            return len(text) < 500
        case [500, str(text)]:
            return ERROR.fullmatch(text) is not None
    return False


@pytest.fixture
def dealer(start):
    """Client of a process that gets the generated messages."""
    process = start(handler=FuzzMessageHandler)
    with zmq.Context() as context:
        dealer = Dealer(context, process.bound_address)
        yield dealer
        dealer.socket.close(0)
    assert process.is_alive()


def fuzz(dealer, number):
    @settings(
        max_examples=number,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(MESSAGES)
    @example([b''])
    @example([b'', b''])
    @example([b'\0' * 5, b'', b'["echo",1]'])
    @example([b'', b'["many",1]', b'', b'["many",1]'])
    def one(frames):
        ((envelope, reply),) = dealer.ask(frames)
        assert envelope == (frames[: frames.index(b'') + 1] if b'' in frames else [])
        assert is_allowed(reply), reply

    one()
    assert dealer.ask(call('echo')) == [([b''], [200, None])]


def test_fuzz(dealer):
    fuzz(dealer, 300)


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_fuzz_10_000_messages(dealer):
    fuzz(dealer, 10_000)
