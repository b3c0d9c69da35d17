# SPDX-License-Identifier: ZPL-2.1
"""Metrics of the services of an application: ``config.include('pyams_zmq.metrics')``."""

from typing import Any

from pyramid.exceptions import ConfigurationError


def includeme(config: Any) -> None:
    """Add ``/zmq/metrics`` to a Pyramid application, a page for Prometheus.

    It asks all services at once, for a second at most, and needs no permission. A `route_prefix` of
    the include is put before the path. The collector is `registry.zmq_metrics`: it can be
    registered with another :class:`prometheus_client.CollectorRegistry`, too.

    :raises pyramid.exceptions.ConfigurationError: if prometheus_client is not installed
    """
    try:
        from pyams_zmq.monitor.metrics import add_metrics  # noqa: PLC0415 - it needs an extra
    except ImportError as error:
        raise ConfigurationError(
            f'The metrics need prometheus_client ({error}): pip install "pyams_zmq[metrics]"'
        ) from error
    config.include('pyams_zmq')
    add_metrics(config)
