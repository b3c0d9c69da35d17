# SPDX-License-Identifier: ZPL-2.1
"""One side of a contender: a program in its environment, led by lines of JSON.

``side.py server PAIR`` tells its address and serves; ``side.py clients PAIR`` forks clients for
each turn that it is told, waits until all are warm, lets them go at once, and tells the rate. Both
end with their standard input.
"""

import gc
import importlib
import json
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic, process_time

from contenders.base import make_args

GRACE = 30
"""Seconds that the clients of a turn may take for connecting, and above its own"""

WARM_UP = 0.1
"""Part of the seconds of a turn in which its clients call before it begins, at least once"""


def load(name):
    """Import a pair."""
    module, attribute = name.split('.')
    return getattr(importlib.import_module(f'contenders.{module}'), attribute)()


def tell(**fields):
    """Write a line for the driver."""
    sys.stdout.write(f'{json.dumps(fields)}\n')
    sys.stdout.flush()


def run_server(pair):
    """Serve until the driver has no more use for it."""

    def end():
        sys.stdin.read()
        try:
            pair.end()
        finally:
            os._exit(0)

    def begin(address):
        # Not before: most servers have forked by now.
        threading.Thread(target=end, daemon=True).start()
        tell(address=address)

    pair.serve(begin)


def run_clients(pair):
    """Run turns until the driver has no more use for them."""
    tell()
    for line in sys.stdin:
        try:
            tell(**run_turn(pair, owner=sys.stdin.fileno(), **json.loads(line)))
        except Exception as error:  # noqa: BLE001 - whatever a contender raises stands in the table
            tell(error=str(error))


def read_processor_time(session):
    """Seconds of processor time that the processes of a session have had so far."""
    ticks = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text(encoding='utf-8', errors='replace').rpartition(')')[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK')


def run_turn(pair, address, size, clients, flight, seconds, server=0, owner=None):
    """Fork clients, let them call.

    :param size: bytes of a message
    :param flight: calls of each client under way at a time
    :param seconds: how long they start calls
    :param server: session of the processes of the server
    :param owner: descriptor that can be read when nobody waits for the turn any more
    :return: `rate`, calls per second of all clients; `client` and `server`, seconds of processor
        time for each call
    """
    args = make_args(size)
    turn = Turn(owner)
    # The collector runs as Python sets it, but not over what was there before.
    gc.collect()
    gc.freeze()
    children = []
    try:
        for _ in range(clients):
            pid = os.fork()
            if not pid:
                turn.run_client(lambda: pair.open(address, args, flight), seconds)
            children.append(pid)
        turn.drop_ends_of_clients()
        turn.wait_for_clients(clients)
        before = read_processor_time(server)
        turn.begin()
        results = list(turn.read_results(clients, seconds))
        calls = sum(count for count, _took, _used in results)
        return {
            'rate': sum(count / took for count, took, _used in results),
            'client': sum(used for _count, _took, used in results) / calls,
            'server': (read_processor_time(server) - before) / calls,
        }
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)  # who has told the result has nothing left to do
            os.waitpid(pid, 0)
        turn.close()


class Turn:
    """Pipes between the clients of a turn and their parent."""

    def __init__(self, owner):
        self._owner = [] if owner is None else [owner]
        self._results, self._result = os.pipe()
        self._signal, self._begin = os.pipe()
        self._unread = b''

    # In a client

    def run_client(self, connect, seconds):
        """Connect, warm up, wait for the others, call; never return."""
        try:
            os.close(self._begin)
            call_for = connect()
            call_for(seconds * WARM_UP)
            self._write('ready')
            os.read(self._signal, 1)
            before = process_time()
            count, took = call_for(seconds)
            self._write([count, took, process_time() - before])
        except BaseException as error:  # noqa: BLE001 - the parent tells it
            self._write(f'{type(error).__name__}: {error}'[:200])
        os._exit(0)

    def _write(self, value):
        os.write(self._result, f'{json.dumps(value)}\n'.encode())  # short: nobody cuts it in two

    # In their parent

    def drop_ends_of_clients(self):
        """Close what only clients use."""
        os.close(self._result)
        os.close(self._signal)
        self._result = self._signal = None

    def wait_for_clients(self, clients):
        """Wait until all are connected."""
        for line in self._read_lines(clients, GRACE):
            if line != 'ready':
                raise RuntimeError(line)

    def begin(self):
        """Let all go."""
        os.close(self._begin)
        self._begin = None

    def read_results(self, clients, seconds):
        """Give for each its calls, the seconds, and those of processor time."""
        for line in self._read_lines(clients, GRACE + seconds):
            if not isinstance(line, list):
                raise RuntimeError(line)  # noqa: TRY004 - the text of an error
            yield line

    def _read_lines(self, number, seconds):
        deadline = monotonic() + seconds
        while number:
            line, newline, rest = self._unread.partition(b'\n')
            if newline:
                self._unread = rest
                number -= 1
                yield json.loads(line)
                continue
            left = max(0, deadline - monotonic())
            ready = select.select([self._results, *self._owner], [], [], left)[0]
            if not ready:
                raise TimeoutError(f'{number} clients are not ready after {seconds:.0f} s')
            if self._results not in ready:
                sys.exit(1)  # the driver has gone
            data = os.read(self._results, 65536)
            if not data:
                raise RuntimeError(f'{number} clients ended without a word')
            self._unread += data

    def close(self):
        """Close what is open."""
        for fd in (self._results, self._result, self._signal, self._begin):
            if fd is not None:
                os.close(fd)


def main():
    """Run the side which the command line names."""
    role, name = sys.argv[1:]
    try:
        pair = load(name)
        {'server': run_server, 'clients': run_clients}[role](pair)
    except ImportError as error:
        tell(missing=str(error))
    except KeyboardInterrupt:  # from the terminal: the driver has heard it, too
        with suppress(Exception):
            pair.end()


if __name__ == '__main__':
    main()
