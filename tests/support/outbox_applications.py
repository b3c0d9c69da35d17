# SPDX-License-Identifier: ZPL-2.1
"""Applications with an outbox in the process of a test, and the services for their messages."""

from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from urllib.parse import urlencode
from uuid import uuid4

from pyramid.request import Request
from sqlalchemy import create_engine

from app import outboxed
from checks import wait_until
from outbox_services import JobRecorder, Recorder
from pyams_zmq.outbox.sqlalchemy import SQLAlchemyStorage
from pyams_zmq.outbox.zodb import ZODBStorage
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.process.name_lock import NameLock
from pyams_zmq.testing import running
from zodb_databases import open_zeo


class Services:
    """The services of the application, which can be started and stopped.

    :param folder: folder for their files
    :ivar recorders: what they have got, by their name
    """

    def __init__(self, folder):
        self._folder = folder
        self._stacks = {}
        self.recorders = {
            'converter': Recorder(folder / 'messages'),
            'renderer': JobRecorder(folder / 'jobs'),
        }
        self.settings = {f'app.{name}': f'ipc://{folder}/{name}.sock' for name in self.recorders}

    def start(self, *names):
        """Start services."""
        for name in names:
            arguments = (self.settings[f'app.{name}'], self.recorders[name])
            if name == 'renderer':
                process = ZMQPool(*arguments, workers=1)
                process.journal = str(self._folder / 'journal')
            else:
                process = ZMQProcess(*arguments)
            self._stacks[name] = ExitStack()
            self._stacks[name].enter_context(running(process))

    def stop(self, *names):
        """Stop services, by default all."""
        for name in names or list(self._stacks):
            self._stacks.pop(name).close()

    def names(self, service='converter'):
        """Return what a service has got, in its order."""
        return self.recorders[service].names()

    def wait_for(self, *names, service='converter'):
        """Wait until a service has got all names, and nothing else."""
        wait_until(lambda: len(self.names(service)) >= len(names))
        assert self.names(service) == list(names)


def remove_lock(application):
    """Remove the file of the lock for the outbox of an application, which does not run any more."""
    Path(NameLock(f'outbox of {application}').path).unlink(missing_ok=True)


class Application:
    """An application in this process.

    :param settings: its settings, see :mod:`app.outboxed`
    """

    def __init__(self, settings):
        self.database = import_module(settings['app.clips'])
        self.app = outboxed.main({}, **settings)
        self.registry = self.app.registry
        self._is_closed = False

    @property
    def outbox(self):
        """The outbox of the application."""
        return self.registry.zmq_outbox

    def get(self, path, **parameters):
        """Send a request; return the response."""
        return Request.blank(f'{path}?{urlencode(parameters)}').get_response(self.app)

    def upload(self, name, **parameters):
        """Upload a clip; return the status of the response."""
        return self.get('/upload', name=name, **parameters).status_int

    def clips(self):
        """Return the names of the clips that are committed."""
        return self.database.read_clips(self.registry)

    def count_waiting(self):
        """Return how many messages are in the outbox, by service."""
        counts = {}
        for each in self.outbox.waiting():
            counts[each.service] = counts.get(each.service, 0) + each.count
        return counts

    def wait_until_empty(self):
        """Wait until no message is in the outbox."""
        wait_until(lambda: not self.outbox.waiting())

    def close(self):
        """Close what it has opened; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        name = self.registry.zmq_clients.application.description
        self.registry.zmq_clients.close()
        self.database.close(self.registry)
        remove_lock(name)


class ApplicationFactory:
    """Makes applications; at the end of the block it closes what they have opened.

    :param settings: the settings of all
    """

    def __init__(self, settings):
        self.settings = {'pyams_zmq.application': f'test {uuid4()}', **settings}
        self._made = []

    def __call__(self, **settings):
        self._made.append(Application({**self.settings, **settings}))
        return self._made[-1]

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for application in self._made:
            application.close()


@contextmanager
def open_storage(settings):
    """Open the storage of an application that runs in other processes.

    :param settings: its settings
    """
    name = settings['pyams_zmq.application']
    with ExitStack() as stack:
        if 'app.url' in settings:
            engine = create_engine(settings['app.url'])
            stack.callback(engine.dispose)
            storage = SQLAlchemyStorage(name, engine=engine)
        else:
            db = stack.enter_context(open_zeo(settings['zodbconn.uri'].removeprefix('zeo://')))
            storage = ZODBStorage(name, db=db)
        stack.callback(storage.close)
        yield storage
