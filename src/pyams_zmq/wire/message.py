# SPDX-License-Identifier: ZPL-2.1
"""The wire format, JSON as RFC 8259 wants it.

A request is ``[type, args]``, or ``[type, args, {"deadline": seconds}]`` if somebody asks for it;
a reply is any JSON value, by convention ``[status, payload]``. What
the standard library lets through (NaN, numbers out of range, lone surrogates) is no JSON and is
refused, in both directions.
"""

import json
import re
import sys
from math import isfinite
from time import time
from typing import Any

import msgspec

from pyams_zmq.exceptions import ZMQMessageError, ZMQRemoteError, ZMQReplyError


class _Options(msgspec.Struct, forbid_unknown_fields=True):
    """Third element of a request.

    :ivar deadline: seconds since the epoch, after which nobody waits for the reply any more
    """

    deadline: float


_decode_request = msgspec.json.Decoder(tuple[str, Any]).decode
_decode_long_request = msgspec.json.Decoder(tuple[str, Any, _Options]).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.encode

MAX_MESSAGE_SIZE = 32 * 1024 * 1024
"""Bytes of the largest request; the server would drop the connection without a word"""

DRAINING = (503, 'The service is stopping, try again later')
"""Status and text for a message whose method was not called"""

DRAINING_REPLY = msgspec.json.encode(DRAINING)

_SCALARS = frozenset({str, int, bool, type(None)})
_KEYS = frozenset({str})
_BAD_JSON = (msgspec.DecodeError, ValueError, RecursionError)
_TYPE_AT_START = re.compile(rb'\s*\[\s*"([\w.]{1,100})"', re.ASCII).match
_ERROR_AT_START = re.compile(rb'\s*\[\s*[45]\d\d\s*[],]').match
_QUOTED = 80
"""Characters of a reply that an error repeats"""


def decode_request(data: bytes) -> tuple[str, Any]:
    """Read a request.

    Of the duplicate keys of an object, the last one wins.

    :return: type and arguments of the message
    :raises ZMQMessageError: with status 400 for anything but ``[str, any]`` or
        ``[str, any, {"deadline": seconds}]``; with status 504 if the deadline has passed
    """
    try:
        return _decode_request(data)
    except _BAD_JSON as error:
        try:
            name, args, options = _decode_long_request(data)
        except _BAD_JSON:
            raise ZMQMessageError(400, f'Bad message, expected [type, args]: {error}') from None
        if options.deadline < time():
            raise ZMQMessageError(504, 'Nobody waits for this answer any more') from None
        return name, args


def encode_message(type: str, args: Any) -> bytes:  # noqa: A002 - the name of the field
    """Write a request, for `ZMQClient.post`.

    :raises TypeError, ValueError: for a type which is no text, or arguments that JSON cannot say
    :raises ZMQMessageError: with status 413, for more than 32 MiB
    """
    if not isinstance(type, str):
        raise TypeError(f'The type of a message is a text, not {type!r}')
    return encode_request([type, args])


def encode_request(message: Any, timeout: float | None = None) -> bytes:
    """Write a request of any form.

    :param timeout: seconds from now after which nobody waits for the reply any more; a message
        ``[type, args]`` tells it to the service. None, or an infinite one, does not
    :raises TypeError, ValueError, RecursionError: for what JSON cannot say
    :raises ZMQMessageError: with status 413, for more than 32 MiB
    """
    if timeout is not None and isfinite(timeout):
        match message:
            case [str(name), args]:
                message = [name, args, {'deadline': time() + timeout}]
    data = encode(message)
    check_size(data)
    return data


def check_size(data: Any) -> None:
    """Check that a server could take a frame.

    :raises ZMQMessageError: with status 413, if it is too large
    """
    if len(data) > MAX_MESSAGE_SIZE:
        raise ZMQMessageError(413, f'Message of {len(data)} bytes, {MAX_MESSAGE_SIZE} can be sent')


def check_timeout(timeout: Any) -> float:
    """Check a number of seconds.

    :raises ValueError: if it is none, or not above 0
    """
    if (
        isinstance(timeout, bool)
        or not isinstance(timeout, (int, float))
        or not timeout > 0
        or (isinstance(timeout, int) and timeout > sys.maxsize)
    ):
        raise ValueError(f'Bad timeout {timeout!r}: write a number of seconds above 0')
    return timeout


def check_concurrency(concurrency: Any) -> int:
    """Check a number of messages at a time.

    :raises ValueError: if it is none, or below 1
    """
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ValueError(f'Bad concurrency {concurrency!r}: write 1 or more')
    return concurrency


def check_retries(retries: Any) -> int:
    """Check a number of further attempts.

    :raises ValueError: if it is none, or negative
    """
    if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
        raise ValueError(f'Bad retries {retries!r}: write 0 or more')
    return retries


def payload_of(reply: Any) -> Any:
    """Take the payload from a reply ``[status, payload]``.

    :raises ZMQRemoteError: if the status is not 2xx
    :raises ZMQReplyError: for a reply of another form
    """
    match reply:
        case [status, payload] if type(status) is int:
            if status // 100 == 2:  # noqa: PLR2004 - as in HTTP
                return payload
            raise ZMQRemoteError(status, payload)
    raise ZMQReplyError(
        f'The reply is not [status, payload], but {str(reply)[:_QUOTED]!r}: use `request` for it'
    )


def decode_reply(data: bytes) -> Any:
    """Read a reply.

    :raises ZMQReplyError: for what is no JSON
    """
    try:
        return _decode_any(data)
    except _BAD_JSON as error:
        raise ZMQReplyError(f'The reply is no JSON: {error}') from None


def peek_type(data: Any) -> bytes:
    """Return the type of a request without decoding the request.

    :param data: the first bytes of ``[type, args]``, 256 are enough
    :return: the type; empty if *data* is not a request, or if the type has more than 100
        characters, or others than ASCII letters, digits, `_` and `.`
    """
    match = _TYPE_AT_START(data)
    return match[1] if match is not None else b''


def is_error(reply: Any) -> bool:
    """Return True if the status of an encoded reply ``[status, payload]`` is 4xx or 5xx."""
    return _ERROR_AT_START(reply) is not None


def encode(value: Any) -> bytes:
    """Write a JSON value.

    :raises TypeError, ValueError, RecursionError: for what JSON cannot say
    """
    try:
        if _is_plain(value):
            return _encode(value)
    except RecursionError:
        pass  # the standard library nests deeper, and says when not
    # Subclasses of str, dict and the like; the standard library also says no to what has no
    # JSON form, where msgspec would find one (a set as a list, bytes as base64, NaN as null).
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def _is_plain(value: Any) -> bool:
    """Tell whether *value* holds nothing but the builtin types of JSON."""
    kind = type(value)
    if kind is dict:
        if not _KEYS.issuperset(map(type, value)):
            return False
        value = value.values()
    elif kind is not list and kind is not tuple:
        return isfinite(value) if kind is float else kind in _SCALARS
    for item in value:  # noqa: SIM110 - a generator takes twice as long
        if type(item) not in _SCALARS and not _is_plain(item):
            return False
    return True
