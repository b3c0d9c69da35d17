# SPDX-License-Identifier: ZPL-2.1
"""An application for the tests of the monitor, and services in all conditions."""

import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from pyramid.config import Configurator

from answering_service import AnsweringService
from checks import freeze, wait_until
from pyams_zmq.config import services_of
from pyams_zmq.testing import running

PING = {'name': 'x', 'kind': 'process', 'version': '3.0.0', 'state': 'up', 'workers': 1}
PASSWORD = 'hush-hush'


class Echo:
    """The handler of the services."""

    def echo(self, args):
        return [200, args]

    def wait(self, folder):
        """Return when a file is there; the first one says that this runs."""
        Path(folder, 'started').touch()
        wait_until(Path(folder, 'go').exists)
        return [200, None]


class Services:
    """Services of an application, which it does not start itself.

    :param folder: folder of their sockets
    :ivar config: configurator of the application
    """

    def __init__(self, folder, stack):
        self.config = Configurator()
        self.config.include('pyams_zmq')
        self._folder = folder
        self._stack = stack
        stack.callback(self.config.registry.zmq_clients.close)

    def declare(self, name, **options):
        """Declare a service; return its address, at which nobody listens yet."""
        address = f'ipc://{self._folder}/{name}'
        options = {'handler': Echo, 'start': 'external', **options}
        self.config.add_zmq_process(name, address=address, **options)
        return address

    def answer(self, name, **replies):
        """Declare and start a service that answers to questions of the monitor."""
        address = self.declare(name)
        questions = {f'pyams_zmq.{key}': reply for key, reply in replies.items()}
        return self._stack.enter_context(AnsweringService(address, questions))

    def run(self, name, **options):
        """Declare and start a real process, or a pool."""
        self.declare(name, **options)
        self.config.commit()
        registry = self.config.registry
        process = services_of(registry)[name].make_process(registry)
        return self._stack.enter_context(running(process))

    def freeze(self, pid):
        """Let a process hang until the end of the test."""
        freeze(pid)
        self._stack.callback(os.kill, pid, signal.SIGCONT)

    @contextmanager
    def waiting(self, name):
        """Let a service run a method until the end of the block."""
        client = self.config.registry.zmq_clients.get(name)
        call = threading.Thread(target=client.call, args=('wait', str(self._folder)))
        call.start()
        wait_until((self._folder / 'started').exists)
        yield
        (self._folder / 'go').touch()
        call.join()

    def add_all(self):
        """Declare services in all conditions."""
        self.answer('draining', ping=[200, {**PING, 'state': 'draining'}])
        self.answer('old')
        self.answer('stopping', ping=[503, 'The service is stopping, try again later'])
        self.answer('up', ping=[200, PING])
        self.answer('withdrawn', ping=[401, 'Your access was withdrawn'])
        self.declare('down')
        self.freeze(self.run('hung').pid)
        self.run('refusing', auth=f'user:{PASSWORD}', client_auth='user:wrong')
