# SPDX-License-Identifier: ZPL-2.1
"""What the package imports: a client without heavy modules, and all but the monitor alone."""

import json
import subprocess
import sys

import pytest

from pyams_zmq import auth
from pyams_zmq.auth import authenticator

HEAVY = {
    *('pyramid', 'webob', 'zope.interface', 'zope.component', 'transaction', 'pkg_resources'),
    *('asyncio', 'tornado', 'zmq.asyncio', 'zmq.eventloop', 'pyams_utils'),
}

LIST_MODULES = """
import json, sys
import pyams_zmq.{module}
print(json.dumps(sorted(sys.modules)))
"""

WITHOUT_PYAMS_UTILS = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'pyams_utils':
            raise ImportError(name)

sys.meta_path.insert(0, Finder())

from importlib import import_module
from pyramid.config import Configurator
from pyramid.request import Request
from pyams_zmq.config import services_of
from pyams_zmq.testing import running

for name in sys.argv[2:]:
    import_module(name)

class Service:
    def greet(self, name, *, request):
        return [200, f'hello {name}']

def greet(request):
    return request.zmq('worker').call('greet', request.params['name'])

with Configurator() as config:
    config.include('pyams_zmq')
    config.add_zmq_process(
        'worker', handler=Service, address=f'ipc://{sys.argv[1]}/zmq', start='external')
    config.add_route('greet', '/')
    config.add_view(greet, route_name='greet', renderer='string')
    app = config.make_wsgi_app()
with running(services_of(app.registry)['worker'].make_process(app.registry)):
    print(Request.blank('/?name=Ann').get_response(app).text)
app.registry.zmq_clients.close()
try:
    import pyams_zmq.monitor.status
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize('module', ['client', 'socket', 'message', 'endpoint', 'exceptions'])
def test_client_is_light(module):
    code = LIST_MODULES.format(module=module)
    output = subprocess.check_output([sys.executable, '-c', code], text=True)
    assert HEAVY.isdisjoint(json.loads(output))


def test_name_that_is_imported_later():
    assert auth.Authenticator is authenticator.Authenticator
    assert {*auth.__all__} <= {*dir(auth)}
    with pytest.raises(AttributeError, match=r"module 'pyams_zmq\.auth' has no attribute 'nobody'"):
        _ = auth.nobody


def test_without_pyams_utils(tmp_path):
    """An application, and its service, in a program that cannot import it."""
    names = [
        f'pyams_zmq.{name}'
        for name in 'aio auth cli client config curve device handler pool process socket stream '
        'supervisor testing transaction'.split()
    ]
    output = subprocess.check_output(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_PYAMS_UTILS, tmp_path, *names],
        text=True,
    )
    assert output.splitlines() == ['hello Ann', 'pyams_utils']
