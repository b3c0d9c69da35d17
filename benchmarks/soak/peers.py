# SPDX-License-Identifier: ZPL-2.1
"""Hostile peers, and a relay that breaks connections."""

import asyncio
import os
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tests/support'))

from access_cases import GREETING, READY

FLOOD = 1500
"""Messages of a flood: more than wait for a peer (1000)"""

CONNECTIONS = 1100
"""More than a service keeps (1000)"""

NAPS = 40
"""Calls of a full queue: twice as many as wait in the pool"""

ENDLESS = 192
"""MiB of a message without end: more than the process takes (128)"""

HOLD = 10.0
"""Seconds that hostile peers stay connected"""


def split(address):
    """Return host and port of an address."""
    host, _, port = address.removeprefix('tcp://').rpartition(':')
    return host, int(port)


def frames(*parts):
    """Encode a message of short frames (RFC 23/ZMTP)."""
    last = len(parts) - 1
    return b''.join(bytes([index < last, len(part)]) + part for index, part in enumerate(parts))


MESSAGES = {
    'flood and reset': (2, frames(b'', b'["nap", 0.001]') * FLOOD),
    'full queue': (1, frames(b'', b'["nap", 0.1]') * NAPS),
    'hang': (1, frames(b'', b'["hang", null]')),
    'half a frame': (20, b'\x01\x00\x00\x64half'),
    'huge header': (20, b'\x02' + (1 << 40).to_bytes(8, 'big') + b'x'),
    'slow reader': (1, frames(b'', b'["read", 1000000]') * 200),
}
"""Number of peers that are ready, and what they send, by the kind of fault"""

PART = b'\x03' + (1 << 20).to_bytes(8, 'big') + bytes(1 << 20)
"""Frame of 1 MiB, after which another one follows"""


class HostilePeers:
    """Connections that speak ZMTP as far as they like; they stay open for `HOLD` seconds."""

    def __init__(self):
        self._held = []
        self._last = []

    def attack(self, kind, address):
        """Do one of the kinds of `KINDS`."""
        if kind == 'garbage':
            self._connect(address, 20, os.urandom(4096))
        elif kind == 'many connections':
            self._connect(address, CONNECTIONS)
        elif kind == 'endless message':
            self._connect(address, 1, GREETING + READY)
            self._send(PART, ENDLESS)
        else:
            number, data = MESSAGES[kind]
            self._connect(address, number, GREETING + READY)
            self._send(data)
            if kind == 'flood and reset':  # one connection now, the other one later
                reset(self._held[-1][1])

    def _connect(self, address, number, data=b''):
        self._last = []
        for _ in range(number):
            peer = socket.create_connection(split(address), 2)
            peer.settimeout(1)
            self._held.append((monotonic(), peer))
            self._last.append(peer)
            with suppress(OSError):
                peer.sendall(data)

    def _send(self, data, times=1):
        """Send something on the last connections, when their handshake is done."""
        for peer in self._last:
            with suppress(OSError):
                received = b''
                while len(received) < len(GREETING + READY):
                    received += peer.recv(4096) or bytes(1000)  # at its end
                for _ in range(times):
                    peer.sendall(data)

    def release(self, age=HOLD):
        """Reset the connections that are older than some seconds."""
        while self._held and self._held[0][0] <= monotonic() - age:
            reset(self._held.pop(0)[1])


def reset(peer):
    """Close a connection with RST."""
    with suppress(OSError):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    peer.close()


class Relay:
    """Forwards connections to a service, in a thread; it can slow them down and reset them."""

    RATE = 512 * 1024
    """Bytes a second of a slow link"""

    def __init__(self, address, target):
        self._address = split(address)
        self._target = split(target)
        self._is_slow = False
        self._writers = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self):
        """Start the thread."""
        self._thread.start()

    def stop(self):
        """End the thread and all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def reset(self):
        """Reset all connections."""
        asyncio.run_coroutine_threadsafe(self._reset(), self._loop).result()

    def slow_down(self, is_slow):
        """Limit the rate of each connection to `RATE`, or not."""
        self._is_slow = is_slow

    def _run(self):
        self._loop.run_until_complete(asyncio.start_server(self._relay, *self._address))
        self._loop.run_forever()
        self._loop.run_until_complete(self._reset())
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.close()

    async def _reset(self):
        for writer in self._writers:
            peer = writer.get_extra_info('socket')
            with suppress(OSError):
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            writer.transport.abort()

    async def _relay(self, reader, writer):
        try:
            to_reader, to_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, to_writer}
        await asyncio.gather(self._forward(reader, to_writer), self._forward(to_reader, writer))
        self._writers -= {writer, to_writer}

    async def _forward(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
                if self._is_slow:
                    await asyncio.sleep(len(data) / self.RATE)
        writer.close()
