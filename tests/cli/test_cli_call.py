# SPDX-License-Identifier: ZPL-2.1
"""`pyams_zmq call`."""

import json
import os
import re
import sys

import pytest

from frame_handlers import FrameHandler


@pytest.fixture
def target(start):
    """Return the options that name the address of a service."""
    return '--address', start().bound_address


@pytest.mark.parametrize(
    ('words', 'expected'),
    [
        (['echo'], None),
        (['echo', '{"path": "a=b.mov", "n": [1, 2.5]}'], {'path': 'a=b.mov', 'n': [1, 2.5]}),
        (['echo', '"é€😀"'], 'é€😀'),
        (['echo', '-5'], -5),
        (['--timeout', '20', 'echo', '--', '-5'], -5),
        (['echo', '--timeout', '20', '"x"'], 'x'),
        (['echo', ' -5'], -5),
    ],
)
def test_result(run, target, words, expected):
    code, out, err = run('call', *target, *words)
    assert (code, err) == (0, '')
    assert json.loads(out) == expected


def test_options_between_words(run, target):
    assert run('call', 'echo', *target, '[1]', '--timeout', '20').out == '[\n  1\n]\n'


def test_argument_from_the_standard_input(run, target):
    code, out, err = run('call', *target, 'echo', '-', stdin='\ufeff{"é": null}'.encode())
    assert (code, out, err) == (0, '{\n  "é": null\n}\n', '')


@pytest.mark.parametrize(
    ('data', 'problem'),
    [
        (b'{"a"', "Expecting ':' delimiter: line 1 column 5 (char 4)"),
        (b'', 'Expecting value: line 1 column 1 (char 0)'),
        (b'[\n1 2]', "Expecting ',' delimiter: line 2 column 3"),
        (b'1 2', 'Extra data: line 1 column 3 (char 2)'),
        (b'"\xe9"', 'not UTF-8 at byte 1'),
        (b'NaN', 'NaN is not a value of JSON'),
        (b'[' * 200_000, 'recursion'),
        (b'1' * 5000, 'integer string conversion'),
    ],
)
def test_bad_json(run, target, data, problem):
    for word, stdin in ((os.fsdecode(data), None), ('-', data)):
        code, out, err = run('call', *target, 'echo', word, stdin=stdin)
        assert (code, out) == (2, '')
        assert re.search(rf'\npyams_zmq call: error: bad JSON: .*{re.escape(problem)}.*\n$', err)


def test_text_that_cannot_be_sent(run, target):
    code, out, err = run('call', *target, 'echo', r'"\ud800"')
    assert (code, out) == (2, '')
    assert 'error: the message cannot be sent: A string with a lone surrogate' in err


@pytest.mark.parametrize(
    ('words', 'problem'),
    [
        ([], 'no method is named: see "pyams_zmq methods"'),
        (['echo', '1', '2', '3'], 'unexpected arguments after the JSON: 2 3'),
        (['echo', '--timeout', '-1'], 'argument --timeout'),
        (['echo', '--timeout', 'x'], "bad value 'x': write a number of seconds above 0"),
        (['echo', '--timeout', 'inf0'], "bad value 'inf0'"),
        (['a=b', 'echo'], 'a=... is for INI, and not for --address'),
    ],
)
def test_usage(run, target, words, problem):
    code, out, err = run('call', *target, *words)
    assert (code, out) == (2, '')
    assert problem in err


def test_method_in_another_encoding(run, target):
    """A locale without UTF-8 leaves the bytes of an argument as surrogates."""
    word = 'é'.encode().decode('ascii', 'surrogateescape')
    assert run('call', *target, word).err == "pyams_zmq: error: 404 Unknown message type 'é'\n"
    code, _out, err = run('call', *target, '\udce9')
    assert code == 2
    assert 'error: the method is not UTF-8' in err


@pytest.mark.parametrize(
    ('status', 'code'), [(401, 3), (403, 3), (404, 1), (409, 1), (500, 1), (503, 1), (504, 5)]
)
def test_remote_error(run, answer, status, code):
    text = f'{"x" * 5000}\n\x1b[2J'
    target = answer(method=[status, text])
    assert run('call', *target, 'pyams_zmq.method') == (
        code,
        '',
        f'pyams_zmq: error: {status} {"x" * 3996}...\n',
    )
    target = answer(method=[status, 'a\n\x1b[2J\u202eb'])
    assert run('call', *target, 'pyams_zmq.method').err == (
        f'pyams_zmq: error: {status} a ?[2J?b\n'
    )


def test_result_with_characters_that_control_a_terminal(run, answer):
    value = {'é': '\x1b[2J\x9b\u202e'}
    code, out, err = run('call', *answer(method=[200, value]), 'pyams_zmq.method')
    assert (code, err) == (0, '')
    assert json.loads(out) == value
    assert out.isascii()


def test_frames(run, start):
    process = start(handler=FrameHandler)
    code, out, err = run('call', '--address', process.bound_address, 'reply', '[1]')
    assert (code, err) == (0, '4 binary frames (22 bytes) are left out\n')
    assert json.loads(out) == [1]


def test_closed_error_output(run, monkeypatch, answer):
    target = answer(method=[500, 'x'])
    with monkeypatch.context() as patch:
        patch.setattr(sys, 'stderr', None)
        assert run('call', *target, 'pyams_zmq.method').code == 1
