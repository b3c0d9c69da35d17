# SPDX-License-Identifier: ZPL-2.1
"""Pages that say if the services of an application run: ``config.include('pyams_zmq.health')``."""

from typing import Any

from pyams_zmq.monitor.health import add_health


def includeme(config: Any) -> None:
    """Add ``/zmq/live``, ``/zmq/health`` and ``/zmq/ready`` to a Pyramid application.

    The first one answers 200 without asking a service. The others ask all services at once, for a
    second at most, and answer 503 if one is down or drains; both are the same, under the names that
    monitors and load balancers look for. They need no permission. A `route_prefix` of the include
    is put before the paths.
    """
    config.include('pyams_zmq')
    add_health(config)
