# SPDX-License-Identifier: ZPL-2.1
"""An application with processes that ``pyams_zmq serve`` runs."""

import logging
import os
import sys
from pathlib import Path

from pyramid.config import Configurator
from pyramid.threadlocal import get_current_registry

from app.handler import MessageHandler, Process
from handlers import ExitingSetup
from pyams_zmq.interfaces import IZMQProcessStartedEvent

INI = """
[app:main]
use = call:app.external:main
app.notes = {folder}/notes
{setting}

[server:main]
use = egg:waitress#main

[loggers]
keys = root

[handlers]
keys = console

[formatters]
keys = plain

[logger_root]
level = INFO
handlers = console

[handler_console]
class = StreamHandler
args = (sys.stderr,)
formatter = plain

[formatter_plain]
format = from the ini file: %(levelname)s %(message)s
"""
"""Ini file of the application; `folder` gets its notes"""


class NotingProcess(Process):
    """Notes the registry which is the current one when it is made."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.made_with = get_current_registry()


def note(event):
    """Append what a process that serves has to say to the file of the settings."""
    process = event.object
    assert process.made_with is process.registry
    words = [process.bound_address, os.getpid(), Path(sys.argv[0]).name]
    with Path(process.registry.settings['app.notes']).open(
        'a', encoding='utf-8', errors='surrogateescape'
    ) as file:
        print(*words, file=file)


SERVICES = (('echo', NotingProcess), ('other', NotingProcess), ('broken', ExitingSetup))


def main(global_config, **settings):
    """Make the WSGI application."""
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        config.add_subscriber(note, IZMQProcessStartedEvent)
        if 'app.address' in settings:
            for name, factory in SERVICES:
                config.add_zmq_process(
                    name,
                    handler=MessageHandler,
                    address=settings['app.address'] + name,
                    factory=factory,
                    start='external',
                )
            config.add_zmq_process('elsewhere', address='127.0.0.1:5555', start='never')
        return config.make_wsgi_app()


def plain(global_config, **settings):
    """Make an application whose services are declared by settings."""
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        return config.make_wsgi_app()


def printing(global_config, **settings):
    """Make an application like that of `plain`, which prints and logs."""
    print('printed')
    logging.getLogger('app').info('logged')
    return plain(global_config, **settings)


def elsewhere(global_config, **settings):
    """Make an application with services that run elsewhere, at the addresses in its settings."""
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        for name in settings['app.services'].split():
            config.add_zmq_process(name, start='never')
        return config.make_wsgi_app()
