# SPDX-License-Identifier: ZPL-2.1
"""The errors of this package: each also inherits the builtin that fits."""


class ZMQBaseError(Exception):
    """Base of all errors of this package.

    :ivar advice: what the client of a declared service adds to the text: the service, how it is
        started, and the next step
    """

    advice: str = ''

    def __str__(self) -> str:
        text = self._describe()
        if not self.advice:
            return text
        return (
            f'{text} {self.advice}' if text.endswith(('.', '!', '?')) else f'{text}. {self.advice}'
        )

    def _describe(self) -> str:
        """Return the text without the advice."""
        return super().__str__()


class ZMQMessageError(ZMQBaseError, ValueError):
    """A message that is answered with ``[status, text]``.

    A method of a handler raises it to choose the reply; the peer reads the text.

    :param status: number, by convention an HTTP status
    :param text: text of the reply
    """

    def __init__(self, status: int, text: str):
        super().__init__(status, text)
        self.status = int(status)
        self.text = str(text)

    def _describe(self) -> str:
        return f'{self.status} {self.text}'


class ZMQStartError(ZMQBaseError, RuntimeError):
    """A process that could not start; the text is the reason."""


class ZMQHandlerError(ZMQStartError, TypeError, ValueError):
    """A message handler that cannot be made, however often that is tried: mend its declaration."""


class ZMQBindError(OSError, ZMQStartError):
    """An address that cannot be bound; `errno` is that of libzmq, `filename` the address."""


class ZMQJournalError(ZMQStartError):
    """A journal of jobs that cannot be used; the text names the file, the reason and the way out.

    :param path: path of the file
    :param reason: the reason, and the way out
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f'The journal {self.path} cannot be used: {self.reason}'


class ZMQTimeoutError(ZMQBaseError, TimeoutError):
    """Something did not happen in time."""


class ZMQUnreachableError(ZMQBaseError, ConnectionError):
    """A service that could not be reached in time, or to which the connection was lost.

    :ivar is_accepted: true if something accepts connections, and does not go on with them: a
        service that hangs, or a forwarder whose service is down
    """

    is_accepted: bool = False


class ZMQBacklogError(ZMQUnreachableError):
    """A client in which too many messages wait; try again later."""


class ZMQOutboxError(ZMQBaseError, RuntimeError):
    """A message that cannot be put into the outbox; the text has the reason and the way out."""


class ZMQRefusedError(ZMQBaseError, ConnectionRefusedError):
    """A service that refuses the connection: wrong credentials, mechanism or address."""


class ZMQVersionError(ZMQBaseError, RuntimeError):
    """A service of pyams_zmq 2, which was not asked because that would block it."""


class ZMQRemoteError(ZMQBaseError, RuntimeError):
    """A reply whose status is not 2xx.

    :param status: status of the reply
    :param payload: payload of the reply, usually a text
    """

    def __init__(self, status: int, payload: object):
        super().__init__(status, payload)
        self.status = status
        self.payload = payload

    @property
    def text(self) -> str:
        """The payload as text."""
        return str(self.payload)

    def _describe(self) -> str:
        return f'{self.status} {self.text}'


class ZMQJobError(ZMQRemoteError):
    """A reply to a question about a job whose status is not 2xx; the job itself has not failed.

    403: only others may do that; 404: the job is not known; 409: it has ended, or has not ended
    yet; 501: the service keeps no jobs.
    """


class ZMQReplyError(ZMQBaseError, ValueError):
    """A reply that is not valid JSON, or has too many frames."""


class ZMQClosedError(ZMQBaseError, ConnectionError):
    """A socket that was closed, or whose context was terminated."""
