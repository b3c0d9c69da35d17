# SPDX-License-Identifier: ZPL-2.1
"""Programs that cannot fork, or cannot have threads."""

import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from pyramid.config import Configurator

from handlers import MessageHandler, Process
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import ThreadDevice
from pyams_zmq.exceptions import ZMQStartError
from pyams_zmq.wire import environment
from pyams_zmq.wire.environment import check_fork, check_server_threads, check_threads

START = """
from handlers import Process
from pyams_zmq.exceptions import ZMQStartError
try:
    Process().start()
except ZMQStartError as error:
    print(error)
"""


def run(code):
    """Run a program; return what it prints."""
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)]
    env = {name: value for name, value in os.environ.items() if not name.startswith('COVERAGE')}
    env['PYTHONUNBUFFERED'] = '1'
    env['PYTHONPATH'] = os.pathsep.join(filter(None, sys.path))
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env,  # the tracer of coverage cannot be imported in a sub-interpreter
    )
    assert not result.stderr
    assert result.returncode == 0
    return result.stdout


def test_usual_program():
    check_fork('Echo')
    check_threads('Echo')


@pytest.mark.parametrize('library', ['gevent', 'eventlet'])
def test_patched_program(library):
    patch = {
        'gevent': 'from gevent import monkey; monkey.patch_all()',
        'eventlet': 'import eventlet; eventlet.monkey_patch()',
    }[library]
    text = run(patch + START)
    assert f'needs threads, which {library} has replaced' in text
    assert 'start it in another program' in text


def test_eventlet_has_replaced_threads(monkeypatch):
    monkeypatch.delitem(sys.modules, 'gevent.monkey', raising=False)
    patched = SimpleNamespace(is_monkey_patched=lambda name: name == 'thread')
    monkeypatch.setitem(sys.modules, 'eventlet.patcher', patched)
    with pytest.raises(ZMQStartError, match='which eventlet has replaced'):
        check_threads('Echo')


def test_library_without_its_patches():
    assert run('import eventlet, eventlet.patcher; from gevent import monkey' + START) == ''


SUB_INTERPRETER = """
try:
    import _interpreters as interpreters
    other = interpreters.create('legacy')
except ImportError:
    import _xxsubinterpreters as interpreters
    other = interpreters.create(isolated=False)
interpreters.run_string(other, {code!r})
import os
os._exit(0)  # as mod_wsgi: the end of a sub-interpreter is not what is tested
"""


def test_sub_interpreter():
    """mod_wsgi runs applications in one, unless it is told otherwise."""
    text = run(SUB_INTERPRETER.format(code=START))
    assert 'cannot be forked in a sub-interpreter' in text
    assert 'WSGIApplicationGroup %{GLOBAL}' in text


def test_client_in_a_sub_interpreter(start):
    process = start()
    code = f"""
from pyams_zmq.client import ZMQClient
with ZMQClient({process.bound_address!r}) as client:
    print(client.call('pid'))
"""
    assert int(run(SUB_INTERPRETER.format(code=code))) == process.pid


def test_not_the_main_interpreter(monkeypatch):
    module = SimpleNamespace(get_current=lambda: (1, 5), get_main=lambda: (0, 1))
    monkeypatch.setattr(environment, 'import_module', lambda name: module)
    with pytest.raises(ZMQStartError, match='in a sub-interpreter'):
        check_fork('Echo')


def test_python_without_sub_interpreters(monkeypatch):
    def fail(name):
        raise ImportError(name)

    monkeypatch.setattr(environment, 'import_module', fail)
    check_fork('Echo')


def report_error(start, connection):
    """Send the error of a start; runs in a process."""
    try:
        start()
    except ZMQStartError as error:
        connection.send(str(error))
    else:
        connection.send('')


def in_process(start, daemon=False):
    """Return the error of a start in a process, or an empty text."""
    reader, writer = multiprocessing.Pipe()
    with reader, writer:
        child = multiprocessing.get_context('fork').Process(
            target=report_error, args=(start, writer), daemon=daemon
        )
        child.start()
        try:
            assert reader.poll(30)
            return reader.recv()
        finally:
            child.join(30)


def test_daemonic_process():
    """hypercorn, for instance, has such workers."""
    text = in_process(Process().start, daemon=True)
    assert 'cannot be started in a daemonic process' in text
    assert 'start it in another program' in text


@contextmanager
def limited_to_no_process():
    """Let the system refuse processes."""
    is_root = os.getuid() == 0
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if is_root:  # which has no limit
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


def test_no_further_process():
    def start():
        with limited_to_no_process():
            Process().start()

    text = in_process(start)
    assert 'cannot be forked' in text
    assert 'Resource temporarily unavailable' in text
    assert 'raise the limit, or start it in another program' in text


def test_application_without_a_further_process():
    """It starts, and the error says what to do."""

    def start():
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger('PyAMS (zmq)').addHandler(handler)
        sys.argv = ['server']
        with Configurator() as config:
            config.include('pyams_zmq')
            config.add_zmq_process(
                'echo', handler=MessageHandler, address=f'ipc://@pyams-{os.getpid()}'
            )
            config.commit()  # another user may not be able to read the environment
            with limited_to_no_process():
                config.make_wsgi_app()
        [text] = [each.getMessage() for each in records if each.levelname == 'ERROR']
        assert text.startswith('The application starts without its services: ')
        assert 'set pyams_zmq.echo.start = external' in text

    assert in_process(start) == ''


def test_uwsgi_without_threads(monkeypatch):
    uwsgi = SimpleNamespace(has_threads=0)
    monkeypatch.setitem(sys.modules, 'uwsgi', uwsgi)
    with pytest.raises(ZMQStartError, match='enable-threads = true'):
        ThreadDevice().start()
    with ZMQClient('tcp://127.0.0.1:9') as client, pytest.raises(ZMQStartError, match='enable-th'):
        client.send('echo', 1)
    uwsgi.has_threads = 1
    check_threads('Echo')


def test_services_of_uwsgi_without_threads(monkeypatch, ask, start):
    """They are forks, which run their threads."""
    monkeypatch.setitem(sys.modules, 'uwsgi', SimpleNamespace(has_threads=0))

    class Checking(Process):
        def setup(self):
            check_server_threads('Echo')
            super().setup()

    process = start(factory=Checking)
    assert ask(process, ['echo', 1]) == [200, 1]
