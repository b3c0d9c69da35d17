# SPDX-License-Identifier: ZPL-2.1
"""One base, and under it the builtin that fits each case."""


class ZMQBaseError(Exception):
    """Base of all errors of this package."""


class ZMQMessageError(ZMQBaseError, ValueError):
    """A message that gets ``[status, text]`` for an answer.

    A method of a handler raises it to choose its own answer; the peer sees the text.

    :param int status: status of the reply, by convention one of HTTP's
    :param str text: what the peer reads
    """

    def __init__(self, status: int, text: str):
        super().__init__(status, text)
        self.status = int(status)
        self.text = str(text)

    def __str__(self) -> str:
        return f'{self.status} {self.text}'


class ZMQStartError(ZMQBaseError, RuntimeError):
    """A process that could not start; its text is the reason its child gave."""


class ZMQBindError(OSError, ZMQStartError):
    """An endpoint that cannot be bound; `errno` is the one of libzmq, `filename` the endpoint."""


class ZMQTimeoutError(ZMQBaseError, TimeoutError):
    """Something did not happen in time."""


class ZMQUnreachableError(ZMQBaseError, ConnectionError):
    """A service that could not be reached in time, or to which the connection was lost."""


class ZMQRefusedError(ZMQBaseError, ConnectionRefusedError):
    """A service that does not let us in: wrong credentials, mechanism or address."""


class ZMQRemoteError(ZMQBaseError, RuntimeError):
    """An answer of a service whose status is not 2xx.

    :param status: status of the reply
    :param payload: what came with it, a text in general
    """

    def __init__(self, status: int, payload: object):
        super().__init__(status, payload)
        self.status = status
        self.payload = payload

    @property
    def text(self) -> str:
        """The payload as text."""
        return str(self.payload)

    def __str__(self) -> str:
        return f'{self.status} {self.text}'


class ZMQReplyError(ZMQBaseError, ValueError):
    """A reply which is not the JSON text it should be."""


class ZMQClosedError(ZMQBaseError, ConnectionError):
    """A socket that was closed, or whose context was terminated."""
