# SPDX-License-Identifier: ZPL-2.1
"""An application that sends through its outbox, and the handler of its services."""

from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from sqlalchemy.exc import OperationalError

from checks import wait_until
from outbox_services import Recorder
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.transaction import send_on_commit, submit_on_commit
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.relay import Relay
from pyams_zmq.outbox.sender import OutboxSender
from pyams_zmq.outbox.storage import Entry
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.testing import running


class Noter(Recorder):
    """A recorder with methods that wait, and that fail."""

    def note(self, *frames):
        """Note a name, which binary frames may precede."""
        return super().note(' '.join([frame.decode() for frame in frames[:-1]] + [frames[-1]]))

    def hold(self, args):
        """Note a name, and wait until the named pipe is opened for writing."""
        name, path = args
        super().note(name)
        with open(path, encoding='ascii'):
            pass
        return [200, None]

    def fail(self, args):
        raise ValueError('the handler has failed')

    def refuse(self, reply):
        """Return the reply, which a list is."""
        return reply


class Service:
    """A service that can be started again at its address; it notes what it gets.

    :param folder: folder of its files
    :param name: its name
    :param factory: class of its handler
    :ivar names: returns what it has noted
    """

    def __init__(self, folder, name, factory=Noter):
        self.address = f'ipc://{folder}/{name}.sock'
        self._recorder = factory(folder / f'{name}.notes')
        self.names = self._recorder.names

    @contextmanager
    def run(self, **limits):
        """Run the service; yield its process.

        :param limits: attributes of the process
        """
        process = ZMQProcess(self.address, self._recorder)
        process.drain_timeout = 3.0
        for name, value in limits.items():
            setattr(process, name, value)
        with running(process):
            yield process

    def wait_for(self, names):
        """Wait until the service has noted some names, and nothing else, in their order."""
        names = list(names)
        wait_until(lambda: len(self.names()) >= len(names))
        assert self.names() == names


class Sending:
    """An application with a database and an outbox.

    :param application: the application, see :class:`databases.Application`
    :param addresses: addresses of its services, by their names
    """

    def __init__(self, application, addresses, name=None):
        self.name = name or f'test {uuid4()}'
        self.application = application
        self.storage = application.make_storage(self.name, engine=application.engine)
        self.clients = {}
        for service, address in addresses.items():
            self.declare(service, address)
        self.outbox = Outbox(self.storage, self.find_client, self.name)
        self._relays = []

    def declare(self, service, address, **options):
        """Declare a service, and close the client that it has had.

        :param options: attributes of its client
        """
        former = self.clients.get(service)
        if former is not None:
            former.close()
        client = self.clients[service] = ZMQClient(address)
        for name, value in options.items():
            setattr(client, name, value)

    def find_client(self, service):
        """Return the client of a service."""
        if service not in self.clients:
            raise LookupError(f'Unknown service {service!r}')
        return self.clients[service]

    def sender(self, request, service='messages'):
        """Return what adds messages to the transaction of a request."""
        return OutboxSender(self.outbox, service, self.find_client(service), request)

    def send(self, request, args, *, type='note', service='messages', frames=None):  # noqa: A002 - the name of the field
        """Send a message in the transaction of a request."""
        sender = self.sender(request, service)
        send_on_commit(sender, type, args, manager=request.tm, frames=frames)

    def submit(self, request, args, *, type='note', service='messages'):  # noqa: A002 - the name of the field
        """Submit a job in the transaction of a request; return it."""
        return submit_on_commit(self.sender(request, service), type, args, manager=request.tm)

    def commit(self, *names, **options):
        """Send messages with these names in one transaction; for the options see `send`."""
        with self.application.request() as request:
            for name in names:
                self.send(request, name, **options)

    def commit_to(self, service, *names):
        """Send messages to a service that need not be declared."""
        with self.application.request() as request:
            for name in names:
                entry = Entry(service, 'note', f'["note", "{name}"]'.encode())
                self.outbox.add(entry, request.tm, request)

    def make_relay(self):
        """Make a relay without a thread, of the same application; for its method `step`."""
        self._relays.append(Relay(self.storage, self.find_client, self.name))
        return self._relays[-1]

    @property
    def relay(self):
        """The relay of this process."""
        return self.outbox._relay.get()

    def count(self, owner=None):
        """Return how many messages wait, of one owner or of all."""
        waiting = []

        def read():
            with suppress(OperationalError):  # sqlite is locked at the moment
                waiting[:] = self.outbox.waiting()
                return True
            return False

        wait_until(read)
        return sum(each.count for each in waiting if owner in (None, each.owner))

    def wait_until_empty(self):
        """Wait until no message waits."""
        wait_until(lambda: not self.count())

    def in_fork(self):
        """Prepare the use in a forked process."""
        self.application.engine.dispose(close=False)

    def close(self):
        """Close the outbox and the clients, and remove the file of the lock."""
        self.outbox.close()
        for relay in self._relays:
            relay.close()
        for client in self.clients.values():
            client.close()
        Path(NameLock(f'outbox of {self.name}').path).unlink(missing_ok=True)
