# SPDX-License-Identifier: ZPL-2.1
"""The declared services in the REST monitor of pyams_utils."""

from collections.abc import Iterator
from typing import Any

from pyams_utils.interfaces.monitor import MONITOR_API_ROUTE, IMonitorExtension
from pyams_utils.monitor import MonitorExtensionStatusProperties
from pyramid.interfaces import IRoutesMapper
from zope.interface import implementer

from pyams_zmq.monitor.condition import DOWN, condition_of
from pyams_zmq.monitor.inquiry import ask_all


@implementer(IMonitorExtension)
class ServicesStatus:
    """Reports which of the declared services answer within a second."""

    def get_status(self, request: Any) -> Iterator[Any]:
        """Yield the status of each service: UP, or DOWN with the reason."""
        for name, answer in ask_all(request.registry, 'pyams_zmq.ping').items():
            is_down = condition_of(answer).status == DOWN
            yield MonitorExtensionStatusProperties(
                f'pyams_zmq: {name}',
                'DOWN' if is_down else 'UP',
                answer.error if is_down else None,
            )


def register_monitor(config: Any) -> None:
    """Add the services to the monitor of pyams_utils, if the application includes it."""
    mapper = config.registry.queryUtility(IRoutesMapper)
    if mapper is not None and mapper.get_route(MONITOR_API_ROUTE) is not None:
        config.registry.registerUtility(ServicesStatus(), IMonitorExtension, name='pyams_zmq')
