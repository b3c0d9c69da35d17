# SPDX-License-Identifier: ZPL-2.1
"""``pyams_zmq call``: calls a method of a service."""

import json
import sys
from argparse import ArgumentParser, Namespace
from functools import partial
from typing import Any, NoReturn

from pyams_zmq.cli.outcome import OK, note
from pyams_zmq.cli.output import write_json
from pyams_zmq.cli.target import add_target, open_target
from pyams_zmq.cli.words import decode_word
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.wire.multipart import Multipart


def add_command(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        'call',
        help='call a method of a service, and write its result as JSON',
        description='Call a method of a service, and write its result as JSON. JSON is its '
        'argument, null by default; "-" reads it from the standard input.',
    )
    add_target(parser, 'METHOD [JSON]')
    parser.set_defaults(run=partial(_run, parser))


def _run(parser: ArgumentParser, args: Namespace) -> int:
    with open_target(parser, args) as target:
        if not target.words:
            parser.error('no method is named: see "pyams_zmq methods"')
        method, *rest = target.words
        try:
            method = decode_word(method)
        except ValueError:
            parser.error(f'the method is not UTF-8: {method!r}')
        if len(rest) > 1:
            parser.error(f'unexpected arguments after the JSON: {" ".join(rest[1:])}')
        argument = _read_json(parser, rest[0]) if rest else None
        try:
            result = target.client.call(method, argument, timeout=target.timeout)
        except ZMQBaseError:
            raise
        except ValueError as error:  # a text of half a character, for instance
            parser.error(f'the message cannot be sent: {error}')
    if isinstance(result, Multipart):
        size = sum(map(len, result.frames))
        note(f'{len(result.frames)} binary frames ({size} bytes) are left out')
        result = result.value
    write_json(result)
    return OK


def _read_json(parser: ArgumentParser, word: str) -> Any:
    if word == '-' and sys.stdin is None:
        parser.error('the standard input is closed')
    try:
        text = sys.stdin.buffer.read().decode('utf-8-sig') if word == '-' else decode_word(word)
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        parser.error(f'bad JSON: {error}')
    except UnicodeDecodeError as error:
        parser.error(f'bad JSON: not UTF-8 at byte {error.start}')
    except (ValueError, RecursionError) as error:
        parser.error(f'bad JSON: {error}')


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f'{name} is not a value of JSON')
