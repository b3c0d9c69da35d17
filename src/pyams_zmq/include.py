# SPDX-License-Identifier: ZPL-2.1
"""The Pyramid include of this package: ``config.include('pyams_zmq')``."""

import sys
from typing import Any

from pyramid.events import ApplicationCreated

from pyams_zmq.config import LATE, add_zmq_encoder, add_zmq_process, declare_from_settings
from pyams_zmq.config.errors import as_settings
from pyams_zmq.config.outbox import set_outbox_from_settings, set_zmq_outbox
from pyams_zmq.config.request_client import ClientRegistry, request_zmq
from pyams_zmq.config.startup import start_services


def include_package(config: Any) -> None:
    """Add this package to a Pyramid application; a second call changes nothing."""
    if getattr(config.registry, 'zmq_clients', None) is not None:
        return
    config.registry.zmq_clients = ClientRegistry(config.registry)
    config.registry.zmq_outbox = None
    config.registry.zmq_outbox_kind = config.registry.zmq_outbox_factory = None
    config.add_translation_dirs('pyams_zmq:locales')
    config.add_directive('add_zmq_process', add_zmq_process)
    config.add_directive('add_zmq_encoder', add_zmq_encoder)
    config.add_directive('set_zmq_outbox', set_zmq_outbox)
    config.add_request_method(request_zmq, 'zmq')
    config.add_subscriber(start_services, ApplicationCreated)
    with as_settings(config):
        config.action('pyams_zmq declare', lambda: declare_from_settings(config), order=LATE)
        config.action(
            'pyams_zmq outbox', lambda: set_outbox_from_settings(config, LATE), order=LATE
        )
        config.action('pyams_zmq monitor', lambda: _register_monitor(config), order=LATE)


def _register_monitor(config: Any) -> None:
    if 'pyams_utils' in sys.modules:  # otherwise the application does not include it
        from pyams_zmq.monitor.status import register_monitor  # noqa: PLC0415 - imports cornice

        register_monitor(config)
