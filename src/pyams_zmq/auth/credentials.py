# SPDX-License-Identifier: ZPL-2.1
"""The users of PLAIN (RFC 24/PLAIN) and their passwords."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CREDENTIAL = 254  # bytes; RFC 24 allows 255, which pyzmq does not read back

Users = str | Sequence[str] | Mapping[str, str] | os.PathLike[str] | None


def parse_users(auth: Users) -> dict[str, str]:
    """Read the users that may connect with PLAIN.

    :param auth: `'user:password'`, where the password may contain colons; for several users: a
        string with one user per line, a sequence, a mapping of user names to passwords, or a file
        (a path object) with one user per line, where empty lines and lines that start with `#` are
        skipped; None for no users
    :return: passwords by user name
    :raises ValueError: for anything else; its text does not contain a secret
    """
    if auth is None or auth == '':
        return {}
    where = f' in {os.fspath(auth)!r}' if isinstance(auth, os.PathLike) else ''
    if isinstance(auth, Mapping):
        users = dict(auth)
    else:
        pairs = [
            line.partition(':') if isinstance(line, str) else ('', '', '') for line in _lines(auth)
        ]
        users = {user: password for user, _colon, password in pairs}
        if len(users) < len(pairs):
            raise ValueError(f'Bad credentials{where}: a user is listed twice')
    if not users or not all(
        _is_credential(text) for credentials in users.items() for text in credentials
    ):
        raise ValueError(
            f"Bad credentials{where}: write auth='user:password', each of 1 to {MAX_CREDENTIAL} "
            'bytes, or several of them'
        )
    return users


def _lines(auth: Any) -> Sequence[Any]:
    if isinstance(auth, os.PathLike):
        path = os.fspath(auth)
        try:
            with open(path, encoding='utf-8-sig') as file:
                auth = file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or 'not UTF-8, or not a valid path'
            raise ValueError(f'Credentials file {path!r}: {reason}') from None
        lines = [line.removesuffix('\r') for line in auth.split('\n')]
        return [line for line in lines if line.strip() and not line.lstrip().startswith('#')]
    if isinstance(auth, str):
        # A single user is not stripped: a password may begin or end with blanks.
        return (
            [line for line in map(str.strip, auth.split('\n')) if line and line[0] != '#']
            if '\n' in auth
            else [auth]
        )
    return auth if isinstance(auth, Sequence) and not isinstance(auth, bytes) else ()


def _is_credential(text: Any) -> bool:
    try:
        return 0 < len(text.encode()) <= MAX_CREDENTIAL
    except (AttributeError, UnicodeEncodeError):  # the text of this error contains the secret
        return False
