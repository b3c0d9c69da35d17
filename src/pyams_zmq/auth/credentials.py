# SPDX-License-Identifier: ZPL-2.1
"""The users of PLAIN (RFC 24/PLAIN) and their passwords."""

import logging
import os
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from typing import Any

LOGGER = logging.getLogger('PyAMS (zmq)')

MAX_CREDENTIAL = 254  # bytes; RFC 24 allows 255, which pyzmq does not read back

_FILE = 'name a file by a path object, in a declared service by auth_file'
_URI = 'file:/'
_SIZE = f'each of 1 to {MAX_CREDENTIAL} bytes'

Users = str | Sequence[str] | Mapping[str, str] | os.PathLike[str] | None


def parse_users(auth: Users) -> dict[str, str]:
    """Read the users that may connect with PLAIN.

    :param auth: `'user:password'`, where the password may contain colons; for several users: a
        string with one user per line, a sequence, a mapping of user names to passwords, or a file
        (a path object) with one user per line, where empty lines and lines that start with `#` are
        skipped; None for no users. The URI of a file, `'file:/run/users'`, is an error
    :return: passwords by user name
    :raises ValueError: for anything else; its text does not contain a secret
    """
    if auth is None or auth == '':
        return {}
    if isinstance(auth, os.PathLike):
        return _read_file(os.fspath(auth))
    if isinstance(auth, Mapping):
        users = dict(auth)
        bad = not all(map(_is_user, users.items()))
    else:
        lines = _lines(auth)
        if any(_is_uri(line) for line in lines):
            raise ValueError(f'Bad credentials: the URI of a file; {_FILE}')
        pairs = [_split(line) for line in lines]
        users = dict(pairs)
        if len(users) < len(pairs):
            raise ValueError('Bad credentials: a user is listed twice')
        bad = not all(map(_is_user, pairs))
    if bad or not users:
        raise ValueError(
            f"Bad credentials: write auth='user:password', {_SIZE}, or several of them; {_FILE}"
        )
    return users


def _read_file(path: str) -> dict[str, str]:
    """Return the users in a file; an error names the line."""
    users: dict[str, str] = {}
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip() or line.lstrip().startswith('#'):
            continue
        user, password = _split(line)
        if user in users:
            raise ValueError(f'Bad credentials in {path!r}, line {number}: a user is listed twice')
        if not _is_user((user, password)):
            raise ValueError(
                f'Bad credentials in {path!r}, line {number}: write user:password, {_SIZE}'
            )
        users[user] = password
    if not users:
        raise ValueError(
            f'Bad credentials in {path!r}: it has no user; write user:password, {_SIZE}'
        )
    return users


class FirstUser(Mapping[str, str]):
    """The first user of a file, read again for each connection, so that a password can change.

    :param path: path of the file
    :raises ValueError: if the file cannot be read; later that is logged, and the user stays
    """

    def __init__(self, path: os.PathLike[str]):
        self._path = path
        self._problem = ''
        self._users = self._read()

    def _read(self) -> dict[str, str]:
        return dict(list(parse_users(self._path).items())[:1])

    def items(self) -> ItemsView[str, str]:
        """Return the user and the password that the file has now."""
        former, self._problem = self._problem, ''
        try:
            self._users = self._read()
        except ValueError as error:
            self._problem = str(error)
            if former != self._problem:  # once, not for each attempt to connect
                LOGGER.error('A client keeps its user: %s', error)
        return self._users.items()

    def __getitem__(self, user: str) -> str:
        return self._users[user]

    def __iter__(self) -> Iterator[str]:
        return iter(self._users)

    def __len__(self) -> int:
        return len(self._users)

    def __repr__(self) -> str:  # without the password
        return f'<{type(self).__name__} {os.fspath(self._path)}>'


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding='utf-8-sig') as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or 'not UTF-8, or not a valid path'
        if _is_uri(path):
            reason += "; write its path without 'file:'"
        raise ValueError(f'Credentials file {path!r}: {reason}') from None
    return [line.removesuffix('\r') for line in text.split('\n')]


def _lines(auth: Any) -> Sequence[Any]:
    if isinstance(auth, str):
        # A single user is not stripped: a password may begin or end with blanks.
        return (
            [line for line in map(str.strip, auth.split('\n')) if line and line[0] != '#']
            if '\n' in auth
            else [auth]
        )
    return auth if isinstance(auth, Sequence) and not isinstance(auth, bytes) else ()


def _is_uri(line: Any) -> bool:
    """Return True for the URI of a file: its path would be the password of a user `file`."""
    return isinstance(line, str) and line.lstrip().lower().startswith(_URI)


def _split(line: Any) -> tuple[str, str]:
    user, _colon, password = line.partition(':') if isinstance(line, str) else ('', '', '')
    return user, password


def _is_user(credentials: tuple[Any, Any]) -> bool:
    return all(map(_is_credential, credentials))


def _is_credential(text: Any) -> bool:
    try:
        return 0 < len(text.encode()) <= MAX_CREDENTIAL
    except (AttributeError, UnicodeEncodeError):  # the text of this error contains the secret
        return False
