# SPDX-License-Identifier: ZPL-2.1
"""The declared services in the REST monitor of pyams_utils."""

from collections.abc import Iterator
from typing import Any

from pyams_utils.interfaces.monitor import MONITOR_API_ROUTE, IMonitorExtension
from pyams_utils.monitor import MonitorExtensionStatusProperties
from pyramid.interfaces import IRoutesMapper
from zope.interface import implementer

from pyams_zmq.config.service import services_of
from pyams_zmq.exceptions import ZMQBaseError


@implementer(IMonitorExtension)
class ServicesStatus:
    """Reports which of the declared services accept a connection within a second."""

    def get_status(self, request: Any) -> Iterator[Any]:
        """Yield the status of each service: UP, or DOWN with the reason."""
        for name in sorted(services_of(request.registry)):
            status, message = 'UP', None
            try:
                request.registry.zmq_clients.get(name).prepare(timeout=1)
            except (ZMQBaseError, OSError, ValueError) as error:
                status, message = 'DOWN', str(error)
            yield MonitorExtensionStatusProperties(f'pyams_zmq: {name}', status, message)


def register_monitor(config: Any) -> None:
    """Add the services to the monitor of pyams_utils, if the application includes it."""
    mapper = config.registry.queryUtility(IRoutesMapper)
    if mapper is not None and mapper.get_route(MONITOR_API_ROUTE) is not None:
        config.registry.registerUtility(ServicesStatus(), IMonitorExtension, name='pyams_zmq')
