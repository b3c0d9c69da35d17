# SPDX-License-Identifier: ZPL-2.1
"""The clients of an application, `request.zmq(name)`."""

import threading
from typing import Any

from pyams_zmq.client.transaction import is_under_way, send_on_commit
from pyams_zmq.config import Service, services_of
from pyams_zmq.interfaces import IZMQClientFactory, IZMQService


class RequestClient:
    """Client of a service for one request, see :func:`request_zmq`."""

    def __init__(self, request: Any, client: Any):
        self._request = request
        self._client = client
        self.call = client.call
        self.request = client.request

    def send(self, type: str, args: Any = None) -> None:  # noqa: A002 - the name of the field
        """Send a message when the transaction of the request is committed, or now if it has none.

        It has none without `request.tm`, and where nobody has begun one: in a callback after the
        response, for instance. In an exception view pyramid_tm still has one, which it will abort.

        :param type: type of the message, the name of the method
        :param args: its arguments, anything that JSON can say
        :raises: what :meth:`ZMQClient.send` and :func:`send_on_commit` do
        """
        manager = getattr(self._request, 'tm', None)
        if manager is not None and is_under_way(manager):
            send_on_commit(self._client, type, args, manager=manager)
        else:
            self._client.send(type, args)


class Clients:
    """Clients of the application, one for each service, made when somebody asks for it."""

    def __init__(self, registry: Any):
        self._registry = registry
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> Any:
        """Give the client of a service.

        :raises LookupError: if there is no such service
        """
        with self._lock:
            client = self._clients.get(name)
            if client is None:
                service = self._registry.queryUtility(IZMQService, name)
                if service is None:
                    names = ', '.join(sorted(services_of(self._registry))) or 'none'
                    raise LookupError(f'There is no ØMQ service {name!r}; declared: {names}')
                make = self._registry.queryUtility(IZMQClientFactory) or Service.make_client
                client = self._clients[name] = make(service)
        return client

    def close(self) -> None:
        """Close all of them."""
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.close()


def request_zmq(request: Any, name: str) -> RequestClient:
    """Give the client of a declared service; the method `zmq` of requests.

    :param name: name of the service
    :raises LookupError: if there is no such service
    """
    return RequestClient(request, request.registry.zmq_clients.get(name))
