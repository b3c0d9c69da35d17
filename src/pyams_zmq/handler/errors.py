# SPDX-License-Identifier: ZPL-2.1
"""The reply to a message whose method has failed."""

import asyncio
import logging
import re
from contextlib import suppress
from uuid import uuid4

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.wire.log_fields import extra
from pyams_zmq.wire.message import encode

LOGGER = logging.getLogger('PyAMS (zmq)')

_SECOND_LOOP = re.compile(r'from a running event loop|loop is (already )?running')
_SECOND_LOOP_ADVICE = (
    ': the loop of the process is running, another one cannot start beside it; make the method '
    '`async def` and await, or let plain methods run in threads (`concurrency` above 1, or a '
    '`timeout` of the method)'
)


def error_reply(error: BaseException, method: str | None = None, job: str | None = None) -> bytes:
    """Return the encoded reply for an exception; it never raises.

    The peer gets the text of a :class:`~pyams_zmq.exceptions.ZMQMessageError`. Any other exception
    is logged under an error id, and the peer gets the id only.

    :param method: name of the method that has raised it, for the log
    :param job: id of the job that the method runs
    """
    try:
        if isinstance(error, ZMQMessageError):
            LOGGER.debug('Message refused: %s', error)
            return encode([error.status, error.text])
    except Exception as nested:  # noqa: BLE001 - a text that JSON cannot represent
        error = nested
    error_id = uuid4().hex[:12]
    try:
        advice = _SECOND_LOOP_ADVICE if _needs_second_loop(error) else ''
        LOGGER.error(
            'Message handler failed, error id %s%s',
            error_id,
            advice,
            exc_info=error,
            extra=extra(method=method, job=job, error_id=error_id),
        )
    except BaseException as nested:  # noqa: BLE001 - the traceback cannot be printed
        with suppress(BaseException):
            LOGGER.error(
                'Message handler failed, error id %s, with an unprintable %s (%s)',
                error_id,
                type(error).__name__,
                type(nested).__name__,
                extra=extra(method=method, job=job, error_id=error_id),
            )
    return encode([500, f'Internal error, see the log of the service under id {error_id}'])


def _needs_second_loop(error: BaseException) -> bool:
    """Return True if the method has called `asyncio.run`, for instance, in the running loop."""
    is_in_loop = asyncio._get_running_loop() is not None
    return isinstance(error, RuntimeError) and is_in_loop and bool(_SECOND_LOOP.search(str(error)))
