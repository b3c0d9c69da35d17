# SPDX-License-Identifier: ZPL-2.1
"""The process of an application in Apache with mod_wsgi, which `.ci/run` installs."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from app.program import HERE, WebServer, reserved_port, wait_for_end
from checks import TIMEOUT, wait_until

MODULES = Path('/usr/lib/apache2/modules')
USER = 'www-data'  # daemon processes of mod_wsgi cannot run as root

CONFIGURATION = """
ServerRoot {folder}
ServerName localhost
PidFile {folder}/apache.pid
Listen 127.0.0.1:{port}
User {user}
Group {user}
ErrorLog {folder}/log
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule wsgi_module {modules}/mod_wsgi.so
WSGISocketPrefix {folder}/wsgi
WSGIDaemonProcess app processes=2 threads=2 home={folder} python-home={home} python-path={path}
WSGIProcessGroup app
{group}
WSGIScriptAlias / {folder}/script.wsgi
<Directory {folder}>
    Require all granted
</Directory>
"""

SCRIPT = """
import os
os.environ['APP_ADDRESS'] = 'ipc://{folder}/zmq.sock'
os.environ['XDG_RUNTIME_DIR'] = '{folder}'
from app.wsgi import application
"""


def why_not():
    """Return why Apache cannot run this Python, or None."""
    if not ((MODULES / f'mod_wsgi.so-{sys.version_info[0]}.{sys.version_info[1]}').exists()):
        return 'there is no mod_wsgi for this Python'
    if sys.base_prefix != '/usr':
        return 'mod_wsgi is for the Python of the system'
    if os.getuid():
        return 'only root can start Apache as another user'
    check = ['setpriv', f'--reuid={USER}', '--clear-groups', sys.executable, '-c', 'import pyramid']
    if subprocess.run(check, check=False, capture_output=True).returncode:
        return f'the user {USER} cannot read this environment'
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


class Apache(WebServer):
    """Apache with mod_wsgi; the options are lines of its configuration."""

    @classmethod
    def start(cls, folder, group, *, port, application='application', **settings):
        """Start Apache, with a line of its configuration for the application group."""
        cls.port = port
        cls.configure(folder, application, settings)
        if application == 'declared':
            ini = folder / 'application.ini'
            ini.write_text(ini.read_text().replace('%(address)s', f'ipc://{folder}/zmq.sock'))
        configuration = CONFIGURATION.format(
            folder=folder,
            port=port,
            user=USER,
            modules=MODULES,
            home=sys.prefix,
            path=os.pathsep.join([str(HERE.parent), *filter(None, sys.path)]),
            group=group,
        )
        (folder / 'apache.conf').write_text(configuration)
        (folder / 'script.wsgi').write_text(SCRIPT.format(folder=folder))
        shutil.chown(folder, USER)
        code = 'import os, sys; os.execvp(sys.argv[1], sys.argv[1:])'
        options = ('-f', folder / 'apache.conf', '-DFOREGROUND')
        return cls(folder, '-c', code, 'apache2', *options)

    def connect(self):
        """Return a connection to the server."""
        return socket.create_connection(('127.0.0.1', self.port), timeout=5)


@pytest.fixture
def port():
    """A port for Apache."""
    with reserved_port() as number:
        yield number


def test_main_interpreter(run_program, port):
    apache = run_program('WSGIApplicationGroup %{GLOBAL}', factory=Apache.start, port=port)
    answer = apache.wait_for_service()
    child = answer['reply'][1]
    for num in (signal.SIGUSR1, signal.SIGHUP):  # a graceful restart, and a quick one
        apache.send_signal(num)
        answer = apache.wait_for_service(but=[child])
        wait_for_end(child, TIMEOUT)
        child = answer['reply'][1]
    apache.send_signal(signal.SIGTERM)
    apache.wait(TIMEOUT)
    wait_until(lambda: not apache.running(), TIMEOUT)


def test_sub_interpreter(run_program, port):
    apache = run_program('', factory=Apache.start, port=port, application='declared')
    wait_until(lambda: apache.get() or 'sub-interpreter' in apache.log.read_text(), TIMEOUT)
    text = apache.log.read_text()
    assert 'cannot be forked in a sub-interpreter of Python' in text
    assert 'set pyams_zmq.worker.start = external' in text
