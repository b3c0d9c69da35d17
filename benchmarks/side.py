# SPDX-License-Identifier: ZPL-2.1
"""One side of a contender: a program in its environment, controlled by lines of JSON.

``side.py server PAIR`` writes its address and serves. ``side.py clients PAIR`` reads a line for
each turn, forks the clients, waits until all have warmed up, starts them together, and writes the
rate. Both end with their standard input.
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
"""Seconds that clients may take to connect, and to end after their turn"""

WARM_UP = 0.1
"""Duration of the calls before a turn, as a part of the turn; at least one call"""


def load(name):
    """Import a pair."""
    module, attribute = name.split('.')
    return getattr(importlib.import_module(f'contenders.{module}'), attribute)()


def write_line(**fields):
    """Write a line for the driver."""
    sys.stdout.write(f'{json.dumps(fields)}\n')
    sys.stdout.flush()


def run_server(pair):
    """Serve until the standard input ends."""

    def end():
        sys.stdin.read()
        try:
            pair.end()
        finally:
            os._exit(0)

    def begin(address):
        # Start the thread only now: most servers fork before.
        threading.Thread(target=end, daemon=True).start()
        write_line(address=address)

    pair.serve(begin)


def run_clients(pair):
    """Run turns until the standard input ends."""
    write_line()
    for line in sys.stdin:
        try:
            write_line(**run_turn(pair, owner=sys.stdin.fileno(), **json.loads(line)))
        except Exception as error:  # noqa: BLE001 - the table shows any error of a contender
            write_line(error=str(error))


def read_processor_time(session):
    """Return the seconds of processor time that the processes of a session have used."""
    ticks = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended meanwhile
            fields = path.read_text(encoding='utf-8', errors='replace').rpartition(')')[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf('SC_CLK_TCK')


def run_turn(pair, address, size, clients, flight, seconds, server=0, owner=None):
    """Fork clients and let them call.

    :param size: message size in bytes
    :param flight: calls in flight for each client
    :param seconds: duration of the turn
    :param server: session id of the processes of the server
    :param owner: descriptor that becomes readable when the driver has ended
    :return: `rate`, calls per second of all clients; `client` and `server`, seconds of processor
        time for each call
    """
    args = make_args(size)
    turn = Turn(owner)
    # The collector keeps its settings, but skips the objects that exist already.
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
            os.kill(pid, signal.SIGKILL)  # clients that have sent their result are idle
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
        """Connect, warm up, wait for the others, call, and exit."""
        try:
            os.close(self._begin)
            call_for = connect()
            call_for(seconds * WARM_UP)
            self._write('ready')
            os.read(self._signal, 1)
            before = process_time()
            count, took = call_for(seconds)
            self._write([count, took, process_time() - before])
        except BaseException as error:  # noqa: BLE001 - the parent reports it
            self._write(f'{type(error).__name__}: {error}'[:200])
        os._exit(0)

    def _write(self, value):
        os.write(self._result, f'{json.dumps(value)}\n'.encode())  # shorter than PIPE_BUF: atomic

    # In their parent

    def drop_ends_of_clients(self):
        """Close the descriptors that only clients use."""
        os.close(self._result)
        os.close(self._signal)
        self._result = self._signal = None

    def wait_for_clients(self, clients):
        """Wait until all clients are ready."""
        for line in self._read_lines(clients, GRACE):
            if line != 'ready':
                raise RuntimeError(line)

    def begin(self):
        """Start the calls of all clients."""
        os.close(self._begin)
        self._begin = None

    def read_results(self, clients, seconds):
        """Yield the calls, seconds, and seconds of processor time of each client."""
        for line in self._read_lines(clients, GRACE + seconds):
            if not isinstance(line, list):
                raise RuntimeError(line)  # noqa: TRY004 - a client failed
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
                raise TimeoutError(f'no line from {number} clients after {seconds:.0f} s')
            if self._results not in ready:
                sys.exit(1)  # the driver has ended
            data = os.read(self._results, 65536)
            if not data:
                raise RuntimeError(f'{number} clients ended without a result')
            self._unread += data

    def close(self):
        """Close the pipes."""
        for fd in (self._results, self._result, self._signal, self._begin):
            if fd is not None:
                os.close(fd)


def main():
    """Run the side that the command line names."""
    role, name = sys.argv[1:]
    try:
        pair = load(name)
        {'server': run_server, 'clients': run_clients}[role](pair)
    except ImportError as error:
        write_line(missing=str(error))
    except KeyboardInterrupt:  # Ctrl-C in the terminal; the driver gets it, too
        with suppress(Exception):
            pair.end()


if __name__ == '__main__':
    main()
