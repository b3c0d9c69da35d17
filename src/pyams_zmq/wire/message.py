# SPDX-License-Identifier: ZPL-2.1
"""Messages and replies, encoded as JSON (RFC 8259).

A request is ``[type, args]`` or ``[type, args, options]``, where the options are an object or null.
A server knows one option, ``deadline``: a number, the seconds since the epoch when the client stops
waiting for the reply. Those for traces are ``traceparent``, ``tracestate`` and ``one_way``, see
:mod:`pyams_zmq.otel`. It ignores other options, up to 20, so that later clients may send them. The
text of the object, with its blanks, may have 4 KiB. A reply is any JSON value, by convention
``[status, payload]``. JSON that the standard library decodes although RFC 8259 does not allow it
(NaN, numbers out of range, lone surrogates) is an error. The other way round, NaN and infinity are
encoded as null, and lone surrogates are an error.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from typing import Any

import msgspec

from pyams_zmq.exceptions import ZMQMessageError, ZMQRemoteError, ZMQReplyError
from pyams_zmq.wire.clock import time
from pyams_zmq.wire.copies import NeedsCopyError, copy_containers, need_copy
from pyams_zmq.wire.multipart import Multipart
from pyams_zmq.wire.values import explain, to_json

_decode_request = msgspec.json.Decoder(tuple[str, Any]).decode
_decode_long_request = msgspec.json.Decoder(tuple[str, Any, msgspec.Raw]).decode
_decode_raw_request = msgspec.json.Decoder(tuple[str, msgspec.Raw]).decode
_decode_long_raw_request = msgspec.json.Decoder(tuple[str, msgspec.Raw, msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(enc_hook=need_copy).encode
_encode_copy = msgspec.json.Encoder(enc_hook=to_json).encode

MAX_MESSAGE_SIZE = 32 * 1024 * 1024
"""Bytes of the largest request, by default; servers drop the connection of larger ones silently"""

MIN_STATUS, MAX_STATUS = 100, 599
"""The numbers that are the status of a reply"""

MAX_OPTIONS = 20
"""Options that a request may have"""

MAX_OPTIONS_SIZE = 4096
"""Bytes of the JSON of these options, as they were sent"""

DRAINING = (503, 'The service is stopping, try again later')
"""Status and text for a message whose method was not called"""


def overloaded(count: int) -> tuple[int, str]:
    """Return status and text for a message that finds only overdue methods; it was not run.

    :param count: number of methods that passed their deadline and have not ended
    """
    what = '1 method passed its deadline and has'
    if count > 1:
        what = f'{count} methods passed their deadline and have'
    return 503, f'The service is overloaded: {what} not ended, try again later'


DRAINING_REPLY = msgspec.json.encode(DRAINING)

_BAD_JSON = (msgspec.DecodeError, ValueError, RecursionError)
_TYPE_AT_START = re.compile(rb'\s*\[\s*"([\w.]{1,100})"', re.ASCII).match
_ERROR_AT_START = re.compile(rb'\s*\[\s*[45]\d\d\s*,').match


def decode_request(data: bytes) -> tuple[str, Any]:
    """Decode a request; of duplicate keys in an object, the last one counts.

    :param data: the JSON frame of the request
    :return: type and arguments of the message
    :raises ZMQMessageError: with status 400 if it is not ``[str, any]`` or ``[str, any, options]``,
        and for options that are not allowed; with status 504 if its deadline has passed
    """
    try:
        return _decode_request(data)
    except _BAD_JSON as error:
        return _decode_long(data, error)[:2]


def decode_with_options(data: bytes) -> tuple[str, Any, dict[str, Any]]:
    """Decode a request as `decode_request` does; return its options, too."""
    try:
        return (*_decode_request(data), {})
    except _BAD_JSON as error:
        return _decode_long(data, error)


def _decode_long(data: bytes, error: Exception) -> tuple[str, Any, dict[str, Any]]:
    try:
        name, args, text = _decode_long_request(data)
    except _BAD_JSON:
        raise ZMQMessageError(400, f'Bad message, expected [type, args]: {error}') from None
    return name, args, _decode_options(text)


def split_request(data: bytes) -> tuple[str, msgspec.Raw, dict[str, Any]]:
    """Return type, JSON text of the arguments, and options of a request.

    :raises ZMQMessageError: as `decode_request` does
    """
    try:
        name, args = _decode_raw_request(data)
    except _BAD_JSON as error:
        try:
            name, args, text = _decode_long_raw_request(data)
        except _BAD_JSON:
            raise ZMQMessageError(400, f'Bad message, expected [type, args]: {error}') from None
        return name, args, _decode_options(text)
    return name, args, {}


def _decode_options(text: msgspec.Raw) -> dict[str, Any]:
    if len(text) > MAX_OPTIONS_SIZE:
        raise ZMQMessageError(
            400, f'Bad message: its options have more than {MAX_OPTIONS_SIZE} bytes'
        )
    try:
        options = _decode_any(text)
    except _BAD_JSON as error:
        raise ZMQMessageError(400, f'Bad message, expected [type, args]: {error}') from None
    if options is None:
        return {}
    _check_options(options)
    return dict(options)


def _check_options(options: Any) -> None:
    if type(options) is not dict:
        raise ZMQMessageError(400, 'Bad message: its options are not an object')
    if len(options) > MAX_OPTIONS:
        raise ZMQMessageError(
            400, f'Bad message: it has {len(options)} options; the limit is {MAX_OPTIONS}'
        )
    deadline = options.get('deadline', inf)
    if type(deadline) is not float and type(deadline) is not int:
        raise ZMQMessageError(
            400, 'Bad message: its option deadline is not a number, the seconds since the epoch'
        )
    if deadline < time():
        raise ZMQMessageError(504, 'The deadline of the message has passed')


def encode_message(
    type: str,  # noqa: A002 - the name of the field
    args: Any,
    max_size: int = MAX_MESSAGE_SIZE,
    frames: Sequence[bytes] = (),
    options: Mapping[str, Any] | None = None,
) -> bytes:
    """Encode a request, for `ZMQClient.post`.

    :param type: type of the message
    :param args: arguments, any value with a JSON form
    :param max_size: bytes of the largest one
    :param frames: its binary frames, which count for its size
    :param options: its options, or None
    :raises TypeError, ValueError: if the type is not a string, or the arguments have no JSON form
    :raises ZMQMessageError: with status 413, if it is larger than *max_size*
    """
    if not isinstance(type, str):
        kind = type.__class__.__name__  # without its value: it may be the arguments
        raise TypeError(f'Bad message type ({kind}): write a string, the name of the method')
    message = [type, args] if options is None else [type, args, options]
    return encode_request(message, max_size=max_size, frames=frames)


def encode_request(
    message: Any,
    timeout: float | None = None,
    max_size: int = MAX_MESSAGE_SIZE,
    frames: Sequence[bytes] = (),
) -> bytes:
    """Encode a request of any form.

    :param message: any value with a JSON form
    :param timeout: seconds from now until the deadline that is added to a call, a message
        ``[type, args]`` or ``[type, args, options]``; None or infinity adds no deadline
    :param max_size: bytes of the largest one
    :param frames: its binary frames, which count for its size
    :raises TypeError, ValueError, RecursionError: if the message has no JSON form
    :raises ZMQMessageError: with status 413, if it is larger than *max_size*
    """
    if timeout is not None and isfinite(timeout):
        match message:
            case [str(name), args]:
                message = [name, args, {'deadline': time() + timeout}]
            case [str(name), args, dict(options)] if 'id' not in options:  # else it submits a job
                message = [name, args, {'deadline': time() + timeout, **options}]
    data = encode(message)
    check_size(data, max_size, frames)
    return data


def check_size(data: Any, max_size: int, frames: Sequence[Any] = ()) -> None:
    """Check the size of a message.

    :param data: bytes, or another buffer
    :param max_size: bytes of the largest one
    :param frames: further frames of it
    :raises ZMQMessageError: with status 413, if it is larger
    """
    size = sum(map(len, frames), len(data)) if frames else len(data)
    if size > max_size:
        raise ZMQMessageError(413, f'Message is {size} bytes; the limit is {max_size}')


def check_timeout(timeout: Any, name: str = 'timeout', most: float = inf) -> float:
    """Check a number of seconds, and return it.

    :param name: what the number is, for the error
    :raises ValueError: if it is not a number above 0, or more than *most*
    """
    if (
        isinstance(timeout, bool)
        or not isinstance(timeout, (int, float))
        or not 0 < timeout <= most
        or (isinstance(timeout, int) and timeout > sys.maxsize)
    ):
        limit = '' if most == inf else f', up to {most:.0f}'
        raise ValueError(f'Bad {name} {timeout!r}: write a number of seconds above 0{limit}')
    return timeout


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Check an integer, and return it.

    :param name: what the number is, for the error
    :raises ValueError: if it is not an integer, less than *least* or more than *most*
    """
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < least or (most is not None and value > most):
        limits = f', {least} or more' if most is None else f' from {least} to {most}'
        raise ValueError(f'Bad {name} {value!r}: write an integer{limits}')
    return int(value)


def check_boolean(name: str, value: Any) -> bool:
    """Check a boolean, and return it: the string 'false' would be true.

    :param name: what it is, for the error
    :raises TypeError: if it is something else
    """
    if not isinstance(value, bool):
        raise TypeError(f'Bad {name} {value!r}: write True or False')
    return value


def status_of(reply: Any) -> int | None:
    """Return the status of a reply ``[status, payload]``, or None if it has another form.

    :param reply: a result, or a decoded reply; a status is an integer from 100 to 599
    """
    match reply:
        case [int(status), _] if MIN_STATUS <= status <= MAX_STATUS:
            return status
    return None


def payload_of(reply: Any) -> Any:
    """Return the payload of a reply ``[status, payload]``, and any other reply as it is.

    :param reply: the decoded reply; a status is an integer from 100 to 599
    :return: the second element if the status is 2xx; of a :class:`Multipart`, another one with the
        payload and the frames
    :raises ZMQRemoteError: if the status is not 2xx
    """
    if isinstance(reply, Multipart):
        return Multipart(payload_of(reply.value), reply.frames)
    status = status_of(reply)
    if status is None:
        return reply
    if status // 100 == 2:  # noqa: PLR2004 - as in HTTP
        return reply[1]
    raise ZMQRemoteError(status, reply[1])


def decode_reply(data: bytes) -> Any:
    """Decode a reply.

    :raises ZMQReplyError: if it is not JSON
    """
    try:
        return _decode_any(data)
    except _BAD_JSON as error:
        raise ZMQReplyError(f'The reply is not JSON: {error}') from None


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
    """Encode a value as JSON; NaN and infinity become null.

    :raises TypeError, ValueError, RecursionError: if the value has no JSON form
    """
    try:
        try:
            return _encode(value)
        except NeedsCopyError:
            return _encode_copy(copy_containers(value))
    except (TypeError, ValueError, BufferError) as caught:
        error = explain(caught, value)
        cause = caught.__cause__
    raise error from cause
