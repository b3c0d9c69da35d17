# SPDX-License-Identifier: ZPL-2.1
"""An application with a database and an outbox.

Settings:

- `app.clips`: module with the database
- `app.converter`: address of a service that another program runs, and gets messages
- `app.renderer`: address of one that gets jobs
- `app.check_interval`: seconds between two looks at the outbox, for programs
"""

import os

from pyramid.config import Configurator
from transaction.interfaces import TransientError

from pyams_zmq.outbox import relay


def home(request):
    """Return our pid, and that of no service."""
    return {'pid': os.getpid(), 'reply': [200, None]}


def upload(request):
    """Store a clip, and send a message about it; the parameter `how` says what happens then.

    The parameter `to` has the names of services, and `type` the type of the message.
    """
    name, how = request.params['name'], request.params.get('how')
    request.add_clip(name)
    if how == 'doomed before':
        request.tm.doom()
    for service in request.params.get('to', 'converter').split():
        request.zmq(service).send(request.params.get('type', 'note'), name)
    if how == 'fail':
        raise ValueError('the view failed')
    if how == 'conflict' and request.environ['retry.attempt'] == 0:
        raise TransientError
    if how == 'doomed after':
        request.tm.doom()
    return {'pid': os.getpid(), 'reply': [200, name]}


def count(request):
    """Raise a counter, and send a message about it unless `to` is empty."""
    request.count(request.params['name'])
    for service in request.params['to'].split():
        request.zmq(service).send('note', request.params['message'])


def render(request):
    """Store a clip, and submit a job for it; return the id of the job."""
    name = request.params['name']
    request.add_clip(name)
    return request.zmq('renderer').submit('note', name).id


def send_now(request):
    """Send a message, and store nothing."""
    name = request.params['name']
    request.zmq('converter').send('note', name)
    return name


def send_late(request):
    """Send a message after the end of the transaction."""
    name = request.params['name']
    request.add_finished_callback(lambda request: request.zmq('converter').send('note', name))
    return name


def show_error(error, request):
    """Send an alarm in the transaction of a view that has failed, which is aborted."""
    request.zmq('converter').send('note', 'alarm')
    request.response.status_int = 500
    return str(error)


VIEWS = {'/': home, '/upload': upload, '/count': count, '/render': render}
VIEWS |= {'/send_now': send_now, '/send_late': send_late}


def main(global_config, **settings):
    """Make the WSGI application."""
    if 'app.check_interval' in settings:
        relay.CHECK_INTERVAL = float(settings['app.check_interval'])
    with Configurator(settings=settings) as config:
        config.include('pyramid_retry')
        config.include('pyramid_tm')
        config.include('pyams_zmq')
        config.include(settings['app.clips'])
        for name in ('converter', 'renderer'):
            if f'app.{name}' in settings:
                config.add_zmq_process(name, address=settings[f'app.{name}'], start='never')
        for path, view in VIEWS.items():
            config.add_route(view.__name__, path)
            config.add_view(view, route_name=view.__name__, renderer='json')
        config.add_exception_view(show_error, context=ValueError, renderer='json')
        return config.make_wsgi_app()
