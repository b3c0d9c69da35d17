# SPDX-License-Identifier: ZPL-2.1
"""Every class of malformed message with its reply; `MESSAGES` is the specification."""

import json
import re
from typing import NamedTuple

import zmq

from handlers import LoggedProcess

LIMIT = LoggedProcess.max_message_size
ERROR = re.compile('Internal error, see the log of the service under id ([0-9a-f]{12})')
ECHO = b'["echo",1]'
SECRET = 'the secret of the handler'


class Case(NamedTuple):
    """A message and its reply."""

    group: str
    name: str
    frames: list
    """All frames that a DEALER sends; a REQ would send those after the delimiter."""
    expected: object
    """The status of an error reply, or a Value."""


class Value(NamedTuple):
    """A reply that is exactly this value."""

    value: object


def call(name, args=None):
    return [b'', json.dumps([name, args]).encode()]


FRAMES = [
    ('none', [b''], 400),
    ('no delimiter', [ECHO], 400),
    ('two, no delimiter', [b'x', ECHO], 400),
    ('1 000, no delimiter', [b'x'] * 1000, 400),
    ('nothing after the delimiter', [b'x', b''], 400),
    ('an empty frame', [b'', b''], 400),
    ('two empty frames', [b'', b'', b''], 400),
    ('one too many before', [b'', b'x', ECHO], 400),
    ('one too many after', [b'', ECHO, b'x'], 400),
    ('one too few', call('first'), 400),
    ('1 000', [b'', *[b'x'] * 999, ECHO], 400),
    ('1 000 empty frames', [b''] * 1001, 400),
    ('1 000, for a method that takes them', [*[b''] * 1000, call('many')[1]], Value([200, 1000])),
    ('1 001 and the JSON text', [b'', *[b'x'] * 1001, call('many')[1]], 400),
    ('1 000 in the envelope', [*[b'x'] * 1000, b'', ECHO], Value([200, 1])),
    ('larger than the limit', [b'', b'x' * (LIMIT + 1)], 413),
    ('larger than the limit in total', [b'', *[b'x' * (LIMIT // 10)] * 11], 413),
    ('as large as the limit', [b'', b'x' * LIMIT], 400),
]

JSON = [
    ('not UTF-8', b'["echo","\xff"]', 400),
    ('UTF-8 that encodes a surrogate', b'["echo","\xed\xa0\x80"]', 400),
    ('UTF-16', '["echo",1]'.encode('utf-16'), 400),
    ('a byte order mark', b'\xef\xbb\xbf["echo",1]', 400),
    ('not JSON', b'echo', 400),
    ('single quotes', b"['echo',1]", 400),
    ('a NUL', b'\0', 400),
    ('a NUL after the message', b'["echo",1]\0', 400),
    ('a NUL in a string', b'["echo","\0"]', 400),
    ('garbage after the message', b'["echo",1]]', 400),
    ('two messages', b'["echo",1]["echo",1]', 400),
    ('truncated', b'["echo",', 400),
    ('a comma too many', b'["echo",1,]', 400),
    ('a number', b'1', 400),
    ('a string', b'"echo"', 400),
    ('null', b'null', 400),
    ('an object', b'{"echo":1}', 400),
    ('a list of 0', b'[]', 400),
    ('a list of 1', b'["echo"]', 400),
    ('a list of 3', b'["echo",1,2]', 400),
    ('100 000 lists', b'[' * 100_000 + b']' * 100_000, 400),
    ('100 000 lists as arguments', b'["echo",' + b'[' * 100_000 + b']' * 100_001, 400),
    ('100 000 objects', b'["echo",' + b'{"a":' * 100_000 + b'1' + b'}' * 100_000 + b']', 400),
    ('NaN', b'["echo",NaN]', 400),
    ('infinity', b'["echo",-Infinity]', 400),
    ('1e999', b'["echo",1e999]', 400),
    ('a lone surrogate', rb'["echo","\ud800"]', 400),
    ('a reversed surrogate pair', rb'["echo","\udc00\ud800"]', 400),
    ('an integer of 5 000 digits', b'["echo",' + b'1' * 5000 + b']', 400),
    ('a leading zero', b'["echo",01]', 400),
    ('an integer of 4 000 digits', b'["echo",' + b'1' * 4000 + b']', Value([200, int('1' * 4000)])),
    ('a surrogate pair', rb'["echo","\ud83d\ude00"]', Value([200, '😀'])),
    ('an escaped NUL', rb'["echo","\u0000"]', Value([200, '\0'])),
    ('duplicate keys', b'["echo",{"a":1,"a":2}]', Value([200, {'a': 2}])),
    ('white space around', b' \r\n\t[ "echo" , 1 ]\n', Value([200, 1])),
]

TYPES = [
    ('a number', 1, 400),
    ('null', None, 400),
    ('a list', ['echo'], 400),
    ('unknown', 'unknown', 404),
    ('empty', '', 404),
    ('private', '_private', 404),
    ('a special method', '__init__', 404),
    ('a special attribute', '__class__', 404),
    ('dotted', 'process.stop', 404),
    ('an attribute of the instance', 'process', 404),
    ('a callable attribute of the instance', 'hook', 404),
    ('a property', 'secret', 404),
    ('an attribute of the class', 'value', 404),
    ('a nested class', 'Nested', 404),
    ('a method of the metaclass', 'mro', 404),
    ('in upper case', 'ECHO', 404),
    ('with a space', 'echo ', 404),
    ('with a NUL', 'echo\0', 404),
    ('of 1 MB', 'x' * 1_000_000, 404),
    ('of 1 MB, not ASCII', '\u0394' * 300_000, 404),
]

FAILURES = [
    'ValueError',
    'TypeError',
    'KeyError',
    'SystemExit',
    'KeyboardInterrupt',
    'GeneratorExit',
    'MemoryError',
    'CancelledError',
]
"""Exceptions that methods raise"""

METHODS = [
    ('takes no argument', 'no_args', None, Value([200, None])),
    ('takes no argument, but gets one', 'no_args', 1, 400),
    ('takes two frames', 'first', None, 400),
    *[(f'raises {name}', 'raises', name, 500) for name in (*FAILURES, 'Unprintable')],
    ('recurses infinitely', 'recurse', None, 500),
    ('chooses its reply', 'raises', 'ZMQMessageError', Value([418, 'I am a teapot'])),
    ('chooses a reply that is not JSON', 'raises', 'bad ZMQMessageError', 500),
    *[
        (f'returns {name}', 'returns', name, 500)
        for name in (
            'object',
            'surrogate',
            'generator',
            'tuple key',
            'cycle',
        )
    ],
    ('returns 100 000 lists', 'deep_result', None, 500),
    ('returns None', 'nothing', None, Value(None)),
    ('returns a set', 'returns', 'set', Value([1])),
    ('returns bytes', 'returns', 'bytes', Value('Ynl0ZXM=')),
    ('returns NaN', 'returns', 'nan', Value(None)),
    ('returns infinity', 'returns', 'infinity', Value([1, {'x': None}])),
    ('returns a subclass of str', 'returns', 'str subclass', Value('text')),
    ('returns a large number', 'returns', 'big', Value(2**70)),
    ('returns a tuple', 'returns', 'tuple', Value([200, 'OK'])),
]

ASYNC = {'raises', 'recurse', 'returns', 'deep_result', 'nothing'}

MESSAGES = [
    *[Case('frames', *case) for case in FRAMES],
    *[Case('JSON', name, [b'', data], expected) for name, data, expected in JSON],
    *[Case('type', name, call(kind), expected) for name, kind, expected in TYPES],
    *[Case('method', name, call(kind, args), expected) for name, kind, args, expected in METHODS],
    Case('method', 'is a generator', call('generates'), 500),
    *[
        Case('async method', name, call(f'async_{kind}', args), expected)
        for name, kind, args, expected in METHODS
        if kind in ASYNC
    ],
    *[
        Case('async method', f'raises {name} in {where}', call(f'{kind}_raises', name), 500)
        for kind, where in (('task', 'a task'), ('gather', 'three tasks'))
        for name in ('ValueError', 'SystemExit', 'KeyboardInterrupt', 'CancelledError')
    ],
]


class Dealer:
    """A client that receives every reply, also an unexpected one."""

    def __init__(self, context, address):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(address)
        self.number = 0

    def send(self, frames):
        self.socket.send_multipart(frames)

    def receive(self, timeout=30):
        """Receive a reply; return its envelope and its value."""
        assert self.socket.poll(timeout * 1000), 'no reply'
        *envelope, reply = self.socket.recv_multipart()
        return envelope, json.loads(reply)

    def ask(self, frames):
        """Send a message; return all replies before the reply to a second message."""
        self.number += 1
        nonce = f'{self.number} of {id(self)}'
        self.send(frames)
        self.send(call('echo', nonce))
        replies = []
        while (reply := self.receive()) != ([b''], [200, nonce]):
            replies.append(reply)
        return replies

    def close(self):
        self.socket.close(linger=10_000)  # sent messages still arrive


def check(case, replies):
    """Check that a message got exactly its reply."""
    ((envelope, reply),) = replies
    assert envelope == (case.frames[: case.frames.index(b'') + 1] if b'' in case.frames else [])
    if isinstance(case.expected, Value):
        assert reply == case.expected.value
        return
    status, text = reply
    assert status == case.expected
    assert isinstance(text, str)
    assert len(text) < 500
    assert SECRET not in text
    if status == 500:
        assert ERROR.fullmatch(text)
    if status == 404:
        kind, _args = json.loads(case.frames[-1])
        assert text == f'Unknown message type {kind[:80]!r}'
