# SPDX-License-Identifier: ZPL-2.1
"""The service that a command is about: one of an application, or one at an address."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

from pyams_zmq.auth.curve import CurveClient
from pyams_zmq.cli.application import load_application
from pyams_zmq.cli.words import split_variables
from pyams_zmq.client import ZMQClient
from pyams_zmq.config.service import services_of
from pyams_zmq.exceptions import ZMQRemoteError, ZMQReplyError, ZMQUnreachableError
from pyams_zmq.monitor.version import check_version
from pyams_zmq.wire.message import check_timeout

TIMEOUT = 5.0
"""Seconds that a command waits for an answer, unless it says how long"""


@dataclass(frozen=True)
class Target:
    """A service, and how to reach it.

    :ivar name: name of the service, or its address if it is not one of an application
    :ivar client: client of the service; its errors say what to do
    :ivar words: the arguments that follow INI and NAME
    :ivar timeout: seconds to wait for an answer; None if they were not given
    :ivar outbox: the outbox of the application, or None
    :ivar may_be_old: true if the service may be one of pyams_zmq 2, which a question would block
    """

    name: str
    client: Any
    words: list[str]
    timeout: float | None
    outbox: Any = None
    may_be_old: bool = True

    def check(self) -> None:
        """Raise an error if a question would block the service.

        :raises: the errors of :func:`.check_version`
        """
        if self.may_be_old:
            check_version(self.client, self.name, self.timeout or TIMEOUT)

    def ask(self, type: str, args: Any = None) -> Any:  # noqa: A002 - the name of the field
        """Return the answer to a question, which does not take long.

        :param type: one of those that each service answers
        :raises: the errors of `check`, and of :meth:`.ZMQClient.call`
        """
        self.check()
        try:
            return self.client.call(type, args, timeout=self.timeout or TIMEOUT, retries=0)
        except ZMQRemoteError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                error.advice = f'{self.name} runs a version of pyams_zmq before 3.0'
            raise

    def ask_object(self, type: str) -> dict[str, Any]:  # noqa: A002 - the name of the field
        """Return the answer to a question, which is an object.

        :raises ZMQReplyError: for another answer
        :raises: the errors of `ask`
        """
        answer = self.ask(type)
        if not isinstance(answer, dict):
            raise ZMQReplyError(f'The answer of {self.name} to {type} is not an object')
        return answer


def add_target(parser: ArgumentParser, words: str = '') -> None:
    """Add the arguments that say which service a command is about.

    :param words: the arguments of the command that follow, for its usage line
    """
    rest = f' {words}' if words else ''
    parser.usage = (
        f'%(prog)s [OPTION ...] INI NAME{rest}\n'
        f'       %(prog)s [OPTION ...] --address ADDRESS{rest}'
    )
    parser.add_argument(
        'words',
        metavar='INI NAME',
        nargs='*',
        help='configuration of the application, and the name of a declared service; '
        'VARIABLE=VALUE is what INI uses as %%(VARIABLE)s',
    )
    parser.add_argument('--timeout', type=_read_timeout, metavar='S', help='seconds to wait')
    parser.add_argument('--address', help='address of the service, instead of INI and NAME')
    parser.add_argument('--auth-file', type=Path, metavar='FILE', help='file with user:password')
    parser.add_argument('--key', metavar='FILE', help='.key_secret file of the client')
    parser.add_argument(
        '--server-key', metavar='KEY', help='public key of the service, or its file'
    )


def _read_timeout(text: str) -> float:
    try:
        return check_timeout(float(text))
    except ValueError:
        raise ArgumentTypeError(f'bad value {text!r}: write a number of seconds above 0') from None


@contextmanager
def open_target(parser: ArgumentParser, args: Namespace) -> Iterator[Target]:
    """Return the service that a command is about, until the end of the block.

    :param parser: parser of the command; it ends the program for bad arguments
    :param args: the arguments
    """
    words, variables = split_variables(args.words)
    if args.address is not None:
        if variables:
            parser.error(f'{next(iter(variables))}=... is for INI, and not for --address')
        with _make_client(parser, args) as client:
            try:
                yield Target(args.address, client, words, args.timeout)
            except ZMQUnreachableError as error:  # one of a declared service has its own advice
                error.advice = (
                    'See the log of the service; start it if it is down, or correct --address'
                )
                raise
        return
    if any(each is not None for each in (args.auth_file, args.key, args.server_key)):
        parser.error('--auth-file, --key and --server-key are for --address')
    if not words:
        parser.error('write INI and NAME, or --address')
    config_uri, *words = words
    registry = load_application(parser, config_uri, variables, logs=False)
    declared = services_of(registry)
    if not words or words[0] not in declared:
        fail_unknown(parser, config_uri, words[:1], declared)
    try:
        client = registry.zmq_clients.get(words[0])
        may_be_old = declared[words[0]].start == 'never'  # this version starts the others
        outbox = registry.zmq_clients.outbox
        yield Target(words[0], client, words[1:], args.timeout, outbox, may_be_old)
    finally:
        registry.zmq_clients.close()


def _make_client(parser: ArgumentParser, args: Namespace) -> ZMQClient:
    """Return a client of the service at an address."""
    if (args.key is None) != (args.server_key is None):
        parser.error('CURVE needs both --key and --server-key')
    try:
        curve = None if args.key is None else CurveClient(args.server_key, args.key)
        return ZMQClient(args.address, auth=args.auth_file, curve=curve)
    except ValueError as error:
        parser.error(str(error))


def fail_extra_words(parser: ArgumentParser, target: Target) -> None:
    """End the program if a command without further arguments got some."""
    if target.words:
        parser.error(f'unexpected arguments: {" ".join(target.words)}')


def fail_unknown(
    parser: ArgumentParser, config_uri: str, unknown: list[str], declared: Any
) -> NoReturn:
    """End the program, because it does not know which services are meant.

    :param unknown: names that are not declared
    :param declared: the names that are
    """
    problem = f'unknown process {", ".join(unknown)}' if unknown else 'no process is named'
    names = ', '.join(sorted(declared)) or 'none'
    parser.error(f'{problem}; {config_uri} declares: {names}')
