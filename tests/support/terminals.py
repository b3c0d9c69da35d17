# SPDX-License-Identifier: ZPL-2.1
"""Programs on a terminal, and the command line in this process."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

from pyramid.threadlocal import manager

from app.external import INI
from app.program import Program
from checks import TIMEOUT
from pyams_zmq.cli import main

COMMAND = ('-W', 'ignore', '-m', 'pyams_zmq')
WITHOUT_RICH = (
    *('-W', 'ignore', '-c'),
    'import sys; sys.modules["rich"] = None\nfrom pyams_zmq.cli import main; sys.exit(main())',
)
"""Arguments of an interpreter that runs the command line as if rich was not installed"""

_CONTROL = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]|\r')


def write_ini(folder, **addresses):
    """Write the ini file of an application with services that run elsewhere; return its path."""
    lines = [f'pyams_zmq.{name}.address = {address}' for name, address in addresses.items()]
    lines.append(f'app.services = {" ".join(addresses)}')
    text = INI.format(folder=folder, setting='\n'.join(lines))
    path = folder / 'application.ini'
    path.write_text(text.replace('external:main', 'external:elsewhere'))
    return str(path)


class Runner:
    """Runs the command line in this process.

    :ivar out, err: what the last run has written
    """

    def __init__(self, capsys, monkeypatch):
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *words):
        """Return the exit code, and the lines of the standard output."""
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', ['pyams_zmq'])
            try:
                code = main(list(map(str, words)))
            except SystemExit as exit_:
                code = exit_.code
        manager.clear()
        self.out, self.err = self._capsys.readouterr()
        assert len(self.err.splitlines()) == bool(self.err) or code in (1, 2)
        return code, self.out.splitlines()


class Terminal:
    """A program whose output is a terminal of 40 lines and 160 columns.

    :ivar text: what it has written so far, without the codes that move the cursor
    """

    def __init__(self, folder, *args, **env):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 160, 0, 0))
        options = {'TERM': 'xterm', 'LC_ALL': 'C.UTF-8', 'COLUMNS': '160', **env}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=folder,
            env=Program.environ(folder, **options),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.raw = ''

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    @property
    def text(self):
        return _CONTROL.sub('', self.raw)

    def _read(self, seconds):
        """Read what it has written; return False at its end."""
        if select.select([self._master], [], [], seconds)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # EIO: no process has the terminal any more
                return False
            self.raw += data.decode(errors='replace')
        return True

    def wait_for(self, *texts):
        """Wait until it has written all of these."""
        self.wait_until(lambda: all(text in self.text for text in texts))

    def wait_until(self, condition):
        """Read what it writes until a condition is true."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self._read(0.1), self.text
            assert time.monotonic() < deadline, self.text

    def wait(self):
        """Wait for its end; return the exit code."""
        deadline = time.monotonic() + TIMEOUT
        while self._read(0.1):
            assert time.monotonic() < deadline, self.text
        return self.process.wait(TIMEOUT)

    def interrupt(self):
        """Do what Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
