# SPDX-License-Identifier: ZPL-2.1
"""An application that starts its process the way PyAMS packages do.

Settings, as those of the PyAMS packages:

- `app.start_handler`: start the process
- `app.tcp_handler`: address of the process
- `app.allow_auth`, `app.allow_clients`: users and addresses that may connect, by default all
- `app.wait_ready`: seconds to wait for the process, by default not at all
- `app.children`: file for the pid of each process that is ready to serve
"""

import atexit
import os
from pathlib import Path

from pyramid.config import Configurator
from pyramid.events import ApplicationCreated
from pyramid.settings import asbool

from app.handler import MessageHandler, Process
from pyams_zmq.interfaces import IZMQProcessStartedEvent
from pyams_zmq.process import process_exit_func
from pyams_zmq.socket import zmq_response, zmq_socket


def start_process(event):
    """Start the process of a new application."""
    registry = event.app.registry
    settings = registry.settings
    if not asbool(settings.get('app.start_handler')):
        return
    process = Process(
        settings['app.tcp_handler'],
        MessageHandler,
        settings.get('app.allow_auth'),
        settings.get('app.allow_clients'),
        registry=registry,
    )
    process.start()
    atexit.register(process_exit_func, process=process)
    registry.app_process = process
    if 'app.wait_ready' in settings:
        process.wait_ready(float(settings['app.wait_ready']))


def note_child(event):
    """Note the pid of a process that serves; runs in that process."""
    with Path(event.object.registry.settings['app.children']).open('a', encoding='ascii') as file:
        file.write(f'{os.getpid()}\n')


def home(request):
    """Return our pid, and that of the process."""
    process = request.registry.app_process
    with zmq_socket(process.bound_address or process.bind_addr) as socket:
        socket.send_json(['pid', None])
        reply = zmq_response(socket, timeout=2)
    return {
        'pid': os.getpid(),
        'address': process.bound_address,
        'process': process.pid,
        'reply': reply,
    }


def main(global_config, **settings):
    """Make the WSGI application."""
    with Configurator(settings=settings) as config:
        config.include('pyams_zmq')
        config.add_subscriber(start_process, ApplicationCreated)
        config.add_subscriber(note_child, IZMQProcessStartedEvent)
        config.add_route('home', '/')
        config.add_view(home, route_name='home', renderer='json')
        return config.make_wsgi_app()
