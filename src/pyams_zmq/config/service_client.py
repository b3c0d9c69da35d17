# SPDX-License-Identifier: ZPL-2.1
"""The client of a declared service: its errors name the service and the next step."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from pyams_zmq.client import Reservation, ZMQClient
from pyams_zmq.client.problem import EncodedMessage
from pyams_zmq.exceptions import ZMQBaseError

_P = ParamSpec('_P')
_T = TypeVar('_T')


def explained(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], _T]:
    """Let the errors of a method name the service; a decorator.

    The object of the method has a method `explain`, which adds to an error.
    """

    @wraps(method)
    def call(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except ZMQBaseError as error:
            self.explain(error)
            raise

    return call


class ServiceClient(ZMQClient):
    """Client of a declared service.

    :ivar get_advice: returns what an error has to add to its text
    """

    get_advice: Callable[[ZMQBaseError], str]

    def explain(self, error: ZMQBaseError) -> None:
        """Add the service, how it is started and the next step to the text of an error."""
        error.advice = self.get_advice(error)

    call = explained(ZMQClient.call)
    request = explained(ZMQClient.request)
    send = explained(ZMQClient.send)
    prepare = explained(ZMQClient.prepare)
    post = explained(ZMQClient.post)
    _ask = explained(ZMQClient._ask)  # of all questions about jobs
    _poll = explained(ZMQClient._poll)  # its limit of time is that of the client
    _result_of = explained(ZMQClient._result_of)

    @explained
    def reserve_all(
        self, messages: Sequence[EncodedMessage], *, timeout: float = 0, held: int = 0
    ) -> list[Reservation]:
        """Wait until messages can be posted, see :meth:`.ZMQClient.reserve_all`."""
        found = super().reserve_all(messages, timeout=timeout, held=held)
        return [ServiceReservation(self, each) for each in found]


class ServiceReservation(Reservation):
    """Room for one message in the backlog of a ServiceClient."""

    def __init__(self, client: ServiceClient, reservation: Reservation):
        vars(self).update(vars(reservation))
        self.explain = client.explain

    check = explained(Reservation.check)
