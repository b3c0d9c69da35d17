# SPDX-License-Identifier: ZPL-2.1
"""The keys of CURVE (RFC 26/CURVEZMQ).

A key is given as its 40 characters of Z85 (RFC 32), or as the path of a file that
:func:`zmq.auth.create_certificates` has written: `NAME.key` contains the public key,
`NAME.key_secret` both keys. No error and no repr of this module contains a secret key.
"""

import os
import re
import struct
from collections.abc import Iterable
from typing import Any

import zmq
from zmq.utils import z85

Key = str | bytes | os.PathLike[str]

_KEY_LENGTH = 40
_SUFFIXES = ('.key', '.key_secret')
_RARE_IN_PATHS = re.compile(r'[:+=^!*?&<>()[\]{}@%$#]')  # a quarter of the characters of a key


class CurveServer:
    """Key of a server, and the public keys of the clients that may connect.

    :param key: secret key of the server, its text or the path of a `.key_secret` file
    :param clients: public keys of the clients: a folder of `.key` files, or a sequence of keys;
        clients with other keys are refused
    :raises ValueError: for a key that cannot be read, and if there are no clients
    """

    def __init__(self, key: Key, clients: Key | Iterable[Key]):
        self.public, self._secret = _load_pair(key)
        self._source = clients if isinstance(clients, (str, os.PathLike)) else tuple(clients)
        self.clients: frozenset[str] = frozenset()
        self.reload()

    def reload(self) -> None:
        """Read the keys of the clients again, from the folder that was given.

        :raises ValueError: for a key that cannot be read, and if there are no clients; then the
            keys do not change
        """
        self.clients = read_keys(self._source)

    def apply(self, socket: Any) -> None:
        """Set the keys of a socket, as a server."""
        socket.curve_server = True
        socket.curve_publickey = self.public
        socket.curve_secretkey = self._secret


def read_keys(source: Any) -> frozenset[str]:
    """Read public keys.

    :param source: a folder of `.key` files, or a sequence of keys
    :raises ValueError: for a key that cannot be read, or if no key is found
    """
    keys = source
    if isinstance(source, (str, os.PathLike)):
        name = _quote(source)
        try:
            names = os.listdir(source)
        except (OSError, ValueError) as error:
            reason = getattr(error, 'strerror', None) or 'not a valid path'
            raise ValueError(f'Folder of CURVE keys{name}: {reason}') from None
        from pathlib import Path  # noqa: PLC0415 - of servers only, which read a folder

        keys = [Path(source, name) for name in sorted(names) if name.endswith('.key')]
    found = frozenset(_load_public(key).decode() for key in keys)
    if not found:
        raise ValueError('CURVE needs the public key of at least one client')
    return found


class CurveClient:
    """Key of a client, and the public key of the server that it trusts.

    :param server: public key of the server, its text or the path of a `.key` file
    :param key: secret key of the client, its text or the path of a `.key_secret` file
    :raises ValueError: for a key that cannot be read
    """

    def __init__(self, server: Key, key: Key):
        self.server = _load_public(server)
        self.public, self._secret = _load_pair(key)

    def apply(self, socket: Any) -> None:
        """Set the keys of a socket, as a client."""
        socket.curve_serverkey = self.server
        socket.curve_publickey = self.public
        socket.curve_secretkey = self._secret


def _quote(path: Any) -> str:
    """Quote a path in an error, unless it may be the text of a key that was taken for a path."""
    text = os.fsdecode(path)
    return '' if _RARE_IN_PATHS.search(text) else f' {text!r}'


def _load_public(key: Key) -> bytes:
    return _load_file(key)[0] if is_key_file(key) else _check_text(key)


def _load_pair(key: Key) -> tuple[bytes, bytes]:
    if not is_key_file(key):
        secret = _check_text(key)
        return zmq.curve_public(secret), secret
    public, loaded = _load_file(key)
    if loaded is None:
        raise ValueError(f'CURVE key{_quote(key)}: the file does not contain a secret key')
    return public, loaded


def is_key_file(key: Any) -> bool:
    """Return True if a key is given as the path of its file."""
    return isinstance(key, os.PathLike) or (
        isinstance(key, str) and key.endswith(_SUFFIXES) and not is_key(key)
    )


def is_key(text: Any) -> bool:
    """Return True for the text of a key."""
    try:
        return bool(_check_text(text))
    except ValueError:
        return False


def _load_file(key: Any) -> tuple[bytes, bytes | None]:
    path = os.fspath(key)
    try:
        from zmq.auth import load_certificate  # noqa: PLC0415 - few clients read a file of keys

        public, secret = load_certificate(path)
        return _check_text(public), None if secret is None else _check_text(secret)
    except OSError as error:
        raise ValueError(f'CURVE key{_quote(path)}: {error.strerror or "no such file"}') from None
    except (ValueError, IndexError):
        raise ValueError(f'CURVE key{_quote(path)}: it does not contain a key') from None


def _check_text(key: Any) -> bytes:
    try:
        text: bytes = key.encode('ascii') if isinstance(key, str) else bytes(key)
        if len(text) == _KEY_LENGTH:
            z85.decode(text)
            return text
    except (ValueError, KeyError, TypeError, struct.error):
        pass
    raise ValueError(
        f'A CURVE key is {_KEY_LENGTH} characters of Z85, or the path of a .key or .key_secret file'
    )
