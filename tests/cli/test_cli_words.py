# SPDX-License-Identifier: ZPL-2.1
"""Words of a command line between options, and what a program for completion learns of them."""

import pytest

from pyams_zmq.cli import make_parser
from pyams_zmq.cli.words import CommandParser, decode_word, split_variables


@pytest.mark.parametrize(
    ('line', 'words'),
    [
        ('a b --number 1', ['a', 'b']),
        ('--number 1 a b', ['a', 'b']),
        ('a --number 1 b --number 2 c', ['a', 'b', 'c']),
        ('a --number 1 - -5 -.5x', None),
        ('a --number 1 - -5', ['a', '-', '-5']),
        ('a --number 1 b -- --number -x', ['a', 'b', '--number', '-x']),
        ('--number 1', []),
        ('a --other b', None),
    ],
)
def test_words_between_options(line, words, capsys):
    parser = CommandParser(prog='x')
    parser.add_argument('words', nargs='*')
    parser.add_argument('--number')
    if words is None:
        with pytest.raises(SystemExit):
            parser.parse_args(line.split())
        assert 'unrecognized arguments: -' in capsys.readouterr().err
    else:
        assert parser.parse_args(line.split()).words == words


def test_variables():
    words = ['app.ini', 'port=1', 'a', 'app.port=x=y', '{"a": "b=c"}', '=', '1=2', 'é_1-x=']
    assert split_variables(words) == (
        ['app.ini', 'a', '{"a": "b=c"}', '=', '1=2'],
        {'port': '1', 'app.port': 'x=y', 'é_1-x': ''},
    )


def test_decode():
    assert decode_word('é') == 'é'
    with pytest.raises(UnicodeDecodeError):
        decode_word('\udce9')


def test_completion():
    """A program for completion finds all commands, and which arguments are files."""
    parser = make_parser()
    [commands] = [each for each in parser._actions if each.metavar == 'COMMAND']
    assert {'ping', 'call', 'serve'} <= set(commands.choices)
    completed = {
        name: {each.dest for each in command._actions if hasattr(each, 'complete')}
        for name, command in commands.choices.items()
    }
    assert completed['ping'] == {'words', 'auth_file', 'key', 'server_key'}
    assert completed['serve'] == {'config_uri'}
    assert completed['keygen'] == {'folder'}
