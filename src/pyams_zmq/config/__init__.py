# SPDX-License-Identifier: ZPL-2.1
"""The services of an application: ``config.add_zmq_process(name, ...)``.

Settings `pyams_zmq.NAME.OPTION` override the options of the directive, or declare a service alone.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pyramid.config.actions import action_method
from pyramid.exceptions import ConfigurationError
from pyramid.interfaces import PHASE1_CONFIG

from pyams_zmq.config.errors import as_settings
from pyams_zmq.config.request_client import RequestClient
from pyams_zmq.config.service import Service, services_of
from pyams_zmq.config.settings import (
    check_addresses,
    check_name,
    check_options,
    check_settings,
    is_complete,
    read_service,
)
from pyams_zmq.interfaces import IZMQService
from pyams_zmq.wire.values import add_encoder, check_encoder

__all__ = ['RequestClient', 'Service', 'add_zmq_encoder', 'add_zmq_process', 'services_of']

LATE = 100
"""Order of actions after those of applications; the phases of Pyramid are -30 to 0"""


@action_method  # type: ignore[untyped-decorator] # Pyramid has no types
def add_zmq_process(config: Any, name: str, **options: Any) -> None:
    """Declare a service; a directive of the configurator.

    :param name: name of the service: letters, digits, `_` and `-`
    :param options: see :doc:`/settings`; the settings `pyams_zmq.NAME.OPTION` override them
    :raises pyramid.exceptions.ConfigurationError: for an unknown option or a bad value, and for an
        address that another service binds, too
    """
    _declare(config, name, options)


def add_zmq_encoder(
    config: Any,
    type: Any,  # noqa: A002 - the name of the argument in the documentation
    encoder: str | Callable[[Any], Any],
    decoder: str | Callable[[Any], Any] | None = None,
) -> None:
    """Add the JSON form of a type; a directive of the configurator.

    See :func:`pyams_zmq.message.add_encoder`: the encoder is for all applications of the program.

    :param type: class or interface, or its dotted name
    :param encoder: function of a value, or its dotted name
    :param decoder: function of the decoded JSON form, or its dotted name
    :raises pyramid.exceptions.ConfigurationError: if `add_encoder` does not allow an argument, or a
        name cannot be imported
    """
    try:
        arguments = [config.maybe_dotted(each) for each in (type, encoder, decoder)]
        check_encoder(*arguments)
    except (TypeError, ValueError, ImportError, AttributeError) as error:
        raise ConfigurationError(f'add_zmq_encoder: {error}') from None
    type = arguments[0]  # noqa: A001 - as above
    introspectable = config.introspectable(
        'ZMQ encoders', type, f'ZMQ encoder of {type.__name__}', 'encoder'
    )
    introspectable.update(zip(('type', 'encoder', 'decoder'), arguments, strict=True))
    config.action(
        ('zmq_encoder', type),
        add_encoder,
        arguments,
        introspectables=(introspectable,),
        order=PHASE1_CONFIG,  # before handlers are checked, which may need its decoder
    )


def declare_from_settings(config: Any) -> None:
    """Declare the services that settings describe completely, and code does not declare.

    The others are left to code that declares them later: with `autocommit`, or after a `commit`,
    this runs before that code.
    """
    settings = config.registry.settings or {}
    for name in check_settings(config.registry):
        is_missing = config.registry.queryUtility(IZMQService, name) is None
        if is_missing and is_complete(settings, name):
            with as_settings(config):
                _declare(config, name, {}, order=LATE)


def _declare(config: Any, name: str, options: Mapping[str, Any], order: int = 0) -> None:
    check_name(name)
    check_options(name, options)
    introspectable = config.introspectable(
        'ZMQ processes', name, f'ZMQ process {name!r}', 'process'
    )

    def register() -> None:
        service = read_service(config, name, options)
        check_addresses(config.registry, service)
        config.registry.registerUtility(service, IZMQService, name=name)
        shown = ('name', 'address', 'handler', 'factory', 'start', 'workers')
        introspectable.update({key: getattr(service, key) for key in shown})

    config.action(('zmq_process', name), register, introspectables=(introspectable,), order=order)
