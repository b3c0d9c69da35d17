# SPDX-License-Identifier: ZPL-2.1
"""Programs in processes of their own, and web servers among them."""

import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from configparser import RawConfigParser
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from checks import wait_until

HERE = Path(__file__).parent

NO_PIDFD = """
import os
del os.pidfd_open
"""
"""First lines of a program that runs as on a system without pidfd"""


def is_running(pid):
    """Return True if a process runs; a zombie does not."""
    try:
        process = psutil.Process(pid)
        # If only the main thread is a zombie, others still hold the sockets.
        return process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1
    except psutil.NoSuchProcess:
        return False


def wait_for_end(pid, timeout):
    """Wait for the end of a process, which need not be a child.

    :return: seconds until then
    """
    start = time.monotonic()
    wait_until(lambda: not is_running(pid), timeout)
    return time.monotonic() - start


@contextmanager
def reserved_port():
    """Reserve a TCP port: only a program that asks for this port can listen on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(('127.0.0.1', 0))  # without `listen`, which would exclude all others
        yield holder.getsockname()[1]


class Program:
    """A Python program in a session of its own; `end` kills all processes of the session.

    :param Path folder: its working folder, with its log
    :param args: arguments of the interpreter
    :param env: more environment variables
    """

    def __init__(self, folder, *args, **env):
        self.log = folder / 'log'
        with self.log.open('ab') as log:
            self.process = subprocess.Popen(
                [sys.executable, *args],
                cwd=folder,
                env=self.environ(folder, **env),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,
            )
        self.pid = self.process.pid

    @staticmethod
    def environ(folder, **env):
        """Environment variables of a program."""
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get('PYTHONPATH'))))
        return {**os.environ, 'PYTHONPATH': path, 'XDG_RUNTIME_DIR': str(folder), **env}

    def read(self, timeout=20):
        """Read a line that the program prints, as JSON."""
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f'no line within {timeout} s; {self.log.read_text()}')
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f'the program ended; {self.log.read_text()}')
        return json.loads(line)

    def write(self, data):
        """Write a line of JSON that the program reads."""
        self.process.stdin.write(json.dumps(data).encode() + b'\n')
        self.process.stdin.flush()

    def send_signal(self, num):
        """Send a signal to the program only."""
        os.kill(self.pid, num)

    def send_signal_to_all(self, num):
        """Send a signal to the group of the program, as a terminal does for Ctrl-C."""
        os.killpg(self.pid, num)

    def wait(self, timeout):
        """Wait for the end of the program; return its exit code."""
        return self.process.wait(timeout)

    def running(self):
        """Return the pids of the processes of the session that still run."""
        return [pid for pid in psutil.pids() if self._is_member(pid) and is_running(pid)]

    def _is_member(self, pid):
        try:
            return os.getsid(pid) == self.pid
        except ProcessLookupError:
            return False

    def end(self):
        """Kill what is left of it."""
        while pids := self.running():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.communicate()


class WebServer(Program):
    """A web server which serves the application on a UNIX socket."""

    @classmethod
    def pserve(cls, folder, *args, address='127.0.0.1', application='application', **settings):
        """Start `pserve`."""
        ini = cls.configure(folder, application, settings)
        return cls(folder, '-m', 'pyramid.scripts.pserve', *args, ini, f'address={address}')

    @classmethod
    def gunicorn(cls, folder, *args, address='127.0.0.1', application='application', **settings):
        """Start `gunicorn`."""
        ini = cls.configure(folder, application, settings)
        paste = ('--paste', ini, '--paste-global', f'address={address}')
        options = ('--bind', 'unix:http.sock', '--config', 'python:app.hooks')
        return cls(folder, '-m', 'gunicorn', *paste, *options, *args)

    @classmethod
    def uwsgi(cls, folder, *args, **options):
        """Start uWSGI with its HTTP router; it replaces itself, and needs the path of modules."""
        script = (Path(sys.executable).parent / 'uwsgi', '--http', 'http.sock', '--need-app')
        path = os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])
        module = ('--module', 'app.wsgi')
        return cls._importing(folder, *script, *module, *args, env={'PYTHONPATH': path}, **options)

    @classmethod
    def uvicorn(cls, folder, *args, **options):
        """Start `uvicorn`."""
        module = ('-m', 'uvicorn', '--uds', 'http.sock', 'app.asgi:asgi_application')
        return cls._importing(folder, *module, *args, **options)

    @classmethod
    def hypercorn(cls, folder, *args, **options):
        """Start `hypercorn`."""
        module = ('-m', 'hypercorn', '--bind', 'unix:http.sock', 'app.asgi:asgi_application')
        return cls._importing(folder, *module, *args, **options)

    @classmethod
    def waitress(cls, folder, *args, **options):
        """Start `waitress-serve`."""
        module = ('-m', 'waitress', '--unix-socket', 'http.sock', 'app.wsgi:application')
        return cls._importing(folder, *module, *args, **options)

    @classmethod
    def _importing(
        cls, folder, *args, address='127.0.0.1', application='application', env=None, **settings
    ):
        """Start a server that imports the application."""
        cls.configure(folder, application, settings)
        return cls(folder, *args, APP_ADDRESS=address, **(env or {}))

    @staticmethod
    def configure(folder, application, settings):
        """Write the settings of the application."""
        parser = RawConfigParser()
        parser.read(HERE / 'application.ini', encoding='utf-8')
        parser['app:main']['use'] = f'call:app.{application}:main'
        if application == 'declared':
            parser['app:main']['pyams_zmq.worker.address'] = '%(address)s'
            parser['app:main']['app.notes'] = '%(here)s/notes'
        for name, value in settings.items():
            parser['app:main'][name if '.' in name else f'app.{name}'] = str(value)
        ini = folder / 'application.ini'
        with ini.open('w', encoding='utf-8') as file:
            parser.write(file)
        return ini

    def __init__(self, folder, *args, **env):
        self.folder = folder
        super().__init__(folder, *args, **env)

    def children(self):
        """Return the pids of the ØMQ processes that were ready once and still run."""
        return self._noted('children')

    def workers(self):
        """Return the pids of the workers of gunicorn that serve."""
        return self._noted('workers')

    def _noted(self, name):
        with suppress(FileNotFoundError):
            pids = (self.folder / name).read_text(encoding='ascii').split()
            return [pid for pid in map(int, pids) if is_running(pid)]
        return []

    def connect(self):
        """Return a connection to the server."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(5)
        try:
            connection.connect(str(self.folder / 'http.sock'))
        except OSError:
            connection.close()
            raise
        return connection

    def stats(self):
        """Return what the stats server of uWSGI says."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.folder / 'stats.sock'))
            with connection.makefile() as file:
                return json.load(file)

    def get(self, path='/'):
        """Send a request to the application; return its answer or None."""
        connection = http.client.HTTPConnection('localhost', timeout=5)
        try:
            connection.sock = self.connect()
            connection.request('GET', path)
            response = connection.getresponse()
            return json.load(response) if response.status == http.HTTPStatus.OK else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def wait_for_service(self, timeout=20, but=()):
        """Wait until the application and its ØMQ process answer.

        :param float timeout: seconds
        :param but: pids of ØMQ processes whose answer does not count
        :return: the answer of the application
        """

        def ask():
            answer = self.get()
            if (
                answer
                and answer['reply'][0] == http.HTTPStatus.OK
                and answer['reply'][1] not in but
            ):
                return answer
            return None

        try:
            return wait_until(ask, timeout)
        except AssertionError:
            raise TimeoutError(f'no service within {timeout} s; {self.log.read_text()}') from None
