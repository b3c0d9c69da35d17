# SPDX-License-Identifier: ZPL-2.1
"""An application that declares its service, and has transactions in a ZODB.

Settings are those of `pyams_zmq.worker`, and `app.children`, see :mod:`app.application`.
"""

import os
import time
from pathlib import Path

import transaction
from pyramid.config import Configurator
from ZODB.DB import DB

from app.application import note_child
from pyams_zmq.exceptions import ZMQBaseError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.interfaces import IZMQProcessStartedEvent


class Handler:
    """Writes notes, among others."""

    def pid(self, args):
        return [200, os.getpid()]

    def note(self, text):
        with Path(self.process.registry.settings['app.notes']).open('a', encoding='utf-8') as file:
            file.write(f'{text}\n')
        return [200, None]

    def sleep(self, seconds):
        time.sleep(seconds)  # the work
        return [200, os.getpid()]

    def crash(self, args):
        os._exit(3)


class MessageHandler(ZMQMessageHandler):
    """Serves Handler."""

    handler = Handler


def home(request):
    """Return our pid, and that of the process."""
    try:
        reply = [200, request.zmq('worker').call('pid', timeout=2)]
    except ZMQBaseError as error:
        reply = [503, str(error)]
    return {'pid': os.getpid(), 'reply': reply}


def quick(request):
    """Return our pid without asking the process."""
    return {'pid': os.getpid(), 'reply': [200, None]}


def slow(request):
    """Wait for a method that takes a second."""
    return {'pid': os.getpid(), 'reply': [200, request.zmq('worker').call('sleep', 1)]}


def send(request):
    """Count, and send; the parameter `how` can make this fail."""
    database = request.registry.database
    connection = database.open(request.tm)
    request.add_finished_callback(lambda request: connection.close())
    root = connection.root()
    root['count'] = root.get('count', 0) + 1
    text = request.params['text']
    for number in (1, 2):
        request.zmq('worker').send('note', f'{text} {number}')
    attempt = request.environ.get('retry.attempt', 0)
    if request.params['how'] == 'conflict' and attempt == 0:
        other = transaction.TransactionManager()
        second = database.open(other)
        second.root()['count'] = 100
        other.commit()
        second.close()
    if request.params['how'] == 'fail':
        raise ValueError('the view failed')
    return {'pid': os.getpid(), 'reply': [200, attempt]}


def main(global_config, **settings):
    """Make the WSGI application."""
    with Configurator(settings=settings) as config:
        config.include('pyramid_retry')
        config.include('pyramid_tm')
        config.include('pyams_zmq')
        config.registry.database = DB(None)
        config.add_zmq_process('worker', handler='app.declared.MessageHandler')
        config.add_subscriber(note_child, IZMQProcessStartedEvent)
        for view, path in ((home, '/'), (quick, '/quick'), (slow, '/slow'), (send, '/send')):
            config.add_route(view.__name__, path)
            config.add_view(view, route_name=view.__name__, renderer='json')
        return config.make_wsgi_app()
