#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#


"""An application with processes that ``pyams_zmq serve`` runs."""

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from pyramid.config import Configurator

from app.handler import MessageHandler, Process
from handlers import ExitingSetup
from pyams_zmq.interfaces import IZMQProcessStartedEvent


@dataclass
class Service:
    """A declared process, as long as the package has none."""

    factory: Any
    handler: Any
    address: Any

    def make_process(self, registry):
        return self.factory(self.address, self.handler, registry=registry)


def declare(config, name, *, start, **options):
    """Declare a process."""
    config.registry.__dict__.setdefault('services', {})[name] = Service(**options)


def include(config):
    """Give the configurator its directive, whoever has it."""
    if find_spec('pyams_zmq.config') is None:
        sys.modules['pyams_zmq.config'] = module = ModuleType('pyams_zmq.config')
        module.services_of = lambda registry: registry.__dict__.get('services', {})
        config.add_directive('add_zmq_process', declare)


def note(event):
    """Append what a process that serves has to say to the file of the settings."""
    process = event.object
    words = [process.bound_address, os.getpid(), Path(sys.argv[0]).name]
    with Path(process.registry.settings['app.notes']).open('a', encoding='ascii') as file:
        print(*words, file=file)


def main(global_config, **settings):
    """Make the WSGI application."""
    with Configurator(settings=settings) as config:
        include(config)
        config.include('pyams_zmq')
        config.add_subscriber(note, IZMQProcessStartedEvent)
        if 'app.address' in settings:
            for name, factory in (('echo', Process), ('other', Process), ('broken', ExitingSetup)):
                config.add_zmq_process(
                    name,
                    handler=MessageHandler,
                    address=settings['app.address'] + name,
                    factory=factory,
                    start='external',
                )
        return config.make_wsgi_app()
