# SPDX-License-Identifier: ZPL-2.1
"""Traces of OpenTelemetry: ``config.include('pyams_zmq.otel')``."""

from typing import Any

from pyramid.exceptions import ConfigurationError


def includeme(config: Any) -> None:
    """Let the clients and services of an application make spans.

    `registry.zmq_tracing` makes them, with the tracer provider of each process; its method `use`
    takes another provider. A client that the application makes itself gets it by assignment:
    ``client.tracing = registry.zmq_tracing``.

    :raises pyramid.exceptions.ConfigurationError: if opentelemetry-api is not installed
    """
    try:
        from pyams_zmq.monitor.tracing import OpenTelemetryTracing  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigurationError(
            f'Traces need opentelemetry-api ({error}): pip install "pyams_zmq[otel]"'
        ) from error
    config.include('pyams_zmq')
    if getattr(config.registry, 'zmq_tracing', None) is None:
        config.registry.zmq_tracing = OpenTelemetryTracing()
