# SPDX-License-Identifier: ZPL-2.1
"""Handlers that cannot be made: a service ends at once, unless another start may succeed."""

import os
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from pyramid.registry import Registry

from checks import TIMEOUT, started, wait_until
from locks import locks_of
from pool_checks import client_of
from pool_handlers import Pool
from pyams_zmq.exceptions import ZMQBindError, ZMQHandlerError, ZMQStartError
from pyams_zmq.interfaces import IZMQProcessGivenUpEvent
from pyams_zmq.process import ZMQProcess
from pyams_zmq.supervisor import Supervisor, SupervisorProcess
from pyams_zmq.supervisor.driver import LOCK_INTERVAL
from pyams_zmq.supervisor.policy import describe_start_error
from pyams_zmq.testing import running

ERROR = ZMQHandlerError('The handler app.Service cannot be made: it has no public method')


def make_nothing(process, stream):
    """Is no factory: it takes another number of arguments."""


class Retrying:
    """Finds its database only when its process is started for the third time."""

    folder: Path

    def __init__(self):
        (self.folder / str(os.getpid())).touch()
        if len(list(self.folder.iterdir())) < 3:
            raise TypeError('the database is not there: secret')

    def greet(self, name):
        return [200, name]


class Names:
    """Names of methods, in a file; counts how often they are read."""

    def __init__(self, folder):
        self.folder = folder

    def __iter__(self):
        with (self.folder / 'reads').open('a') as file:
            file.write('.')
        return iter((self.folder / 'names').read_text().split())


def test_it_is_not_started_again(fakes, caplog):
    events = []
    fakes.supervisor.registry = Registry()
    fakes.supervisor.registry.registerHandler(events.append, [IZMQProcessGivenUpEvent])
    fakes.step()
    fakes.made[-1].error = ERROR
    assert fakes.crash() is None
    assert fakes.supervisor.is_finished
    assert fakes.supervisor.exit_code == 1
    assert fakes.step(3600) is None
    assert len(fakes.made) == 1
    assert [(event.name, event.exit_code) for event in events] == [('fake', 1)]
    [record] = [record for record in caplog.records if record.levelname == 'CRITICAL']
    assert record.getMessage() == f'fake is not started again, each start would fail: {ERROR}'


def test_it_has_served_before(fakes):
    """Its declaration depends on something, so another start may succeed."""
    fakes.step()
    fakes.made[-1].ready = True
    fakes.step(fakes.crash(3600))
    fakes.made[-1].error = ERROR
    assert fakes.crash() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ('error', 'text'),
    [
        (ERROR, str(ERROR)),
        (
            ZMQBindError(13, 'Permission denied', 'tcp://127.0.0.1:1'),
            '[Errno 13] Permission denied',
        ),
        (LookupError('no user admin:secret'), 'LookupError, see the log of the service'),
        (ZMQStartError('Error: secret'), 'ZMQStartError, see the log of the service'),
    ],
)
def test_text_for_clients(error, text):
    assert describe_start_error(error).startswith(text)
    assert 'secret' not in describe_start_error(error)


def test_clients_read_the_reason(fakes, address):
    """Until the process is ready, also after the end of its supervisor."""
    own, client, other = locks_of(address, *'ααβ')
    fakes.supervisor.address_locks = {'fake': own}
    assert client.find_problem() == ''
    fakes.step()
    fakes.made[-1].error = LookupError('secret')
    delay = fakes.crash()
    assert client.find_problem() == 'LookupError, see the log of the service'
    assert other.find_problem() == ''
    assert client.find_other_owner() is None
    own.release()
    assert client.find_problem() == 'LookupError, see the log of the service'
    assert fakes.step(delay) == LOCK_INTERVAL
    assert client.find_problem() == ''  # a new attempt
    fakes.made[-1].error = ERROR
    fakes.crash()
    assert client.find_problem() == str(ERROR)
    own.note_problem('two\nlines')
    assert client.find_problem() == 'two lines'
    own.release()


def test_note_is_cleared_when_it_is_ready(fakes, address):
    own, client = locks_of(address, *'αα')
    fakes.supervisor.address_locks = {'fake': own}
    fakes.step()
    fakes.made[-1].error = LookupError()
    fakes.step(fakes.crash())
    assert client.find_problem()
    fakes.made[-1].ready = True
    fakes.step()
    assert client.find_problem() == ''
    own.release()


def test_process_that_cannot_be_made(fakes, address):
    own, client = locks_of(address, *'αα')
    fakes.supervisor.address_locks = {'fake': own}
    fakes.supervisor._children[0].factory = partial(int, 'secret')
    fakes.step()
    assert client.find_problem() == 'ValueError, see the log of the service'
    own.release()


def test_real_process(caplog):
    """Its command ends, with the reason in the log."""
    supervisor = Supervisor({'one': partial(ZMQProcess, '127.0.0.1', make_nothing)})
    assert supervisor.run() == 1
    assert caplog.text.count('is not started again') == 1
    assert 'test_supervisor_handler.make_nothing cannot be made: it is called with' in caplog.text


def test_error_of_its_own_code(tmp_path, monkeypatch):
    """The process is started until its handler can be made."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)
    monkeypatch.setattr(Retrying, 'folder', tmp_path, raising=False)
    registry = Registry()
    supervisor = Supervisor({'one': partial(ZMQProcess, '127.0.0.1', Retrying, registry=registry)})

    def step():
        supervisor.step(time.monotonic())
        return [each for each in supervisor.processes.values() if each._was_ready()]

    wait_until(step, TIMEOUT)
    assert len(list(tmp_path.iterdir())) == 3
    supervisor.stop()
    wait_until(lambda: (step(), not supervisor.processes)[1], TIMEOUT)


def notifying(folder):
    """Return a registry which notes the names of the processes that are given up, in a folder."""
    registry = Registry()
    registry.registerHandler(
        lambda event: (folder / event.name).open('a').write('.'), [IZMQProcessGivenUpEvent]
    )
    return registry


@pytest.mark.parametrize('retries', [False, True])
def test_pool(retries, tmp_path):
    """It ends, and does not let its clients wait in the broker."""
    registry = notifying(tmp_path)
    pool = Pool('127.0.0.1', handler=make_nothing, workers=2, registry=registry)
    pool.retries_start = retries
    pool.start()
    with pytest.raises(ZMQHandlerError, match='make_nothing cannot be made'):
        pool.wait_ready(TIMEOUT)
    pool.join(TIMEOUT)
    assert pool.exitcode == 1
    assert (tmp_path / pool.name).exists() == retries


@pytest.mark.usefixtures('lock_folder')
def test_pool_of_an_application(tmp_path):
    """It is given up once, and its supervisor keeps the lock."""
    registry = notifying(tmp_path)

    def make():
        pool = Pool('127.0.0.1', handler=make_nothing, workers=2, registry=registry)
        pool.name = 'digest'
        pool.retries_start = True
        return pool

    with started(SupervisorProcess({'digest': make}, registry=registry, lock='a lock')) as process:
        wait_until((tmp_path / 'digest').exists, TIMEOUT)
        wait_until(lambda: not psutil.Process(process.pid).children(), TIMEOUT)
        assert process.is_alive()
    assert (tmp_path / 'digest').read_text() == '.'


def test_pool_that_works(tmp_path, monkeypatch):
    """A worker that cannot replace another one does not end it."""
    monkeypatch.setattr(Supervisor, 'min_delay', 0.01)

    class Service:
        repeatable = Names(tmp_path)

        def pid(self, args):
            return [200, os.getpid()]

    (tmp_path / 'names').write_text('pid')
    with running(Pool, handler=Service, workers=1) as pool, client_of(pool) as client:
        pid = client.call('pid')
        (tmp_path / 'names').write_text('other')
        (tmp_path / 'reads').unlink()
        pool.reload()
        wait_until((tmp_path / 'reads').exists, TIMEOUT)
        wait_until(lambda: len((tmp_path / 'reads').read_text()) >= Supervisor.max_starts, TIMEOUT)
        assert client.call('pid') == pid
