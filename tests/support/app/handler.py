# SPDX-License-Identifier: ZPL-2.1
"""Methods that take time, and make a file when they start."""

import asyncio
import hashlib
import multiprocessing
import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

import handlers
from app.program import is_running
from checks import wait_until
from pyams_zmq.socket import zmq_socket

COMMANDS = {
    'plain': 'echo $$; exec sleep 60',
    'shell': 'sleep 60 & echo $$ $!; wait',
    'deaf': 'trap "" TERM; echo $$; exec sleep 60',
    'detached': 'setsid sleep 60 >&- & echo $!',
    'deaf and detached': 'trap "" TERM; setsid sleep 60 >&- & echo $!',
}
"""Shell commands that print their pids and run for a minute, by name"""


class Program:
    """One of these commands, started.

    :ivar pids: its processes
    """

    def __init__(self, name):
        self.name = name
        self.process = subprocess.Popen(
            ['sh', '-c', COMMANDS[name]], stdout=subprocess.PIPE, text=True
        )
        self.pids = [int(word) for word in self.process.stdout.readline().split()]
        if 'detached' in name:
            self.process.wait()


class Handler(handlers.Handler):
    """Methods that block take the path of a file to make when they start, and seconds."""

    def work(self, args):
        """Block, in a call that a signal interrupts."""
        path, seconds = args
        Path(path).touch()
        time.sleep(seconds)  # the work
        return [200, seconds]

    def work_on(self, args):
        """Block; when this process is asked to stop, make a file and wait for its removal."""
        path, asked = args
        Path(path).touch()
        while not self.process.draining:
            time.sleep(0.01)
        Path(asked).touch()
        wait_until(lambda: not Path(asked).exists())
        return [200, asked]

    async def async_work(self, args):
        """Wait on the loop."""
        path, seconds = args
        await asyncio.to_thread(Path(path).touch)
        await asyncio.sleep(seconds)
        return [200, seconds]

    def deaf_work(self, args):
        """Block, and block signals too."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        return self.work(args)

    def native_work(self, args):
        """Block in a native call, which no signal interrupts; far longer than any test."""
        path, seconds = args
        Path(path).touch()
        hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 2**31 - 1)
        return [200, seconds]

    def start_programs(self, names):
        """Start programs by `subprocess`; return their pids by name."""
        self.programs = [Program(name) for name in names]
        return [200, {each.name: each.pids for each in self.programs}]

    async def start_async_program(self, args):
        self.program = await asyncio.create_subprocess_exec('sleep', '60')
        return [200, self.program.pid]

    def start_command(self, command):
        """Start a shell command, and do not wait for it."""
        self.program = subprocess.Popen(['sh', '-c', command])
        return [200, self.program.pid]

    def start_later(self, args):
        """Start a program in a thread, after some seconds."""

        def start():
            time.sleep(seconds)
            with open(path, 'w') as file:
                subprocess.Popen(['sh', '-c', 'echo $$; exec sleep 60'], stdout=file)

        path, seconds = args
        threading.Thread(target=start).start()
        return [200, None]

    def run_in_a_thread(self, args):
        """Run a shell command in a thread, which writes its exit code to a file; return its pid."""

        def wait():
            Path(path).write_text(str(program.wait()), encoding='ascii')

        path, command = args
        program = subprocess.Popen(['sh', '-c', command])
        threading.Thread(target=wait).start()
        return [200, program.pid]

    def run_one_after_the_other(self, path):
        """Run programs in a daemon thread, one after the other; append their pids to a file."""

        def work():
            while True:
                with subprocess.Popen(['sleep', '60']) as program, open(path, 'a') as file:
                    file.write(f'{program.pid} ')

        threading.Thread(target=work, daemon=True).start()
        return [200, None]

    def exit_codes(self, args):
        """Return the exit codes of children that ended long before they are waited for."""
        program = subprocess.Popen(['sh', '-c', 'exit 7'])
        child = multiprocessing.Process(target=os._exit, args=(5,))
        child.start()
        for _ in range(2):  # for two steps of the reaper
            orphan = int(subprocess.check_output(['sh', '-c', 'sleep 0.01 & echo $!']))
            wait_until(lambda pid=orphan: not psutil.pid_exists(pid), 5)
        child.join()
        codes = [program.wait(), child.exitcode]
        return [200, [*codes, subprocess.run(['sh', '-c', 'exit 9'], check=False).returncode]]

    def left(self, args):
        """Return the programs of the last process that still ran when this one was set up."""
        return [200, self.process.left]

    def exit(self, args):
        """End this process at once."""
        os._exit(args)

    def compute(self, args):
        """Block in Python, and block signals too."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        path, seconds = args
        Path(path).touch()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return [200, seconds]

    def signal_elsewhere(self, seconds):
        """Get a SIGTERM in another thread, when this one waits for messages."""
        threading.Timer(
            seconds, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        ).start()
        return [200, seconds]


class MessageHandler(handlers.MessageHandler):
    """Serves Handler."""

    handler = Handler


class Process(handlers.Process):
    """Serves Handler."""

    before = ()
    """Pids of processes; `left` returns those that still run"""

    def setup(self):
        self.left = [pid for pid in self.before if is_running(pid)]
        super().setup()

    def __init__(self, bind_addr='127.0.0.1', handler=MessageHandler, *args, **kwargs):
        super().__init__(bind_addr, handler, *args, **kwargs)


@contextmanager
def in_hand(address, name, seconds=60):
    """Send a message; when the handler has started, return the socket that waits for the reply."""
    with tempfile.TemporaryDirectory() as folder, zmq_socket(address) as socket:
        path = Path(folder) / 'started'
        socket.send_json([name, [str(path), seconds]])
        wait_until(path.exists, 10)
        yield socket
