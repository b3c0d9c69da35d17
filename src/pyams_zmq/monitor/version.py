# SPDX-License-Identifier: ZPL-2.1
"""Services of pyams_zmq 2 are not asked: a message of an unknown type blocks them permanently."""

from typing import Any

from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQUnreachableError, ZMQVersionError
from pyams_zmq.wire.clock import monotonic


def check_version(client: Any, name: str, timeout: float) -> None:
    """Raise an error if a question would block a service, or if that cannot be found out.

    It sends nothing. A service that is down may be one of pyams_zmq 2 when it is there again, so it
    is not asked before it is known.

    :param client: client of the service; one that is not a ZMQClient, of a test perhaps, may ask
    :param name: name of the service, for errors
    :param timeout: seconds
    :raises ZMQVersionError: if it runs a version of pyams_zmq before 3.0
    :raises: the errors of :meth:`.ZMQClient.prepare`, if it is down or refuses the connection
    """
    if not isinstance(client, ZMQClient):
        return
    end = monotonic() + timeout
    half = min(timeout / 2, client.connect_timeout)
    found = client.find_socket_type(timeout=half)
    if found is None:
        client.prepare(timeout=half)  # it connects without sending anything, or says what is wrong
        found = client.find_socket_type(timeout=end - monotonic())
    if found is None:
        raise ZMQUnreachableError(
            f'{name} does not say which type of socket it has: it was not asked, because that '
            'blocks a service of pyams_zmq before 3.0'
        )
    if found == 'REP':
        raise ZMQVersionError(
            f'{name} runs a version of pyams_zmq before 3.0 (its socket is a REP), which a '
            'question would block: it was not asked'
        )
