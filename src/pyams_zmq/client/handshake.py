# SPDX-License-Identifier: ZPL-2.1
"""Servers that end the handshake of a client without an error.

A server that cannot open the first command, because the client trusts another key, hangs up after
its greeting (RFC 26/CURVEZMQ). One that expects another mechanism hangs up when it reads that of
the client, and often has sent only the beginning of its greeting. For libzmq that is the same event
as the end of a connection to a forwarder whose service is not there yet. The kernel knows how many
bytes came in.
"""

import os
import socket as network
from contextlib import suppress

from pyams_zmq.wire.endpoint import Endpoint
from pyams_zmq.wire.traffic import Traffic

HANGUPS = 3
"""Handshakes in a row whose end counts as a refusal; a service that stops ends one"""

_PROBE_TIMEOUT = 0.05  # seconds to wait for the greeting of a service at an ipc address

# Signature, version 3.0, mechanism, not as a server, filler: see RFC 37/ZMTP.
_CURVE_GREETING = b'\xff' + bytes(8) + b'\x7f\3\0' + b'CURVE'.ljust(20, b'\0') + bytes(32)

# Bytes of a greeting, see RFC 37/ZMTP: at least the signature, which a server sends at once, and
# the version, to which the client answers with its mechanism. A server that opens the first command
# sends more than the greeting. TCP counts the end of the stream as a byte, too.
_BEGINNING = 11
_GREETING = 64
_ENDED = (7, 8)  # TCP_CLOSE and TCP_CLOSE_WAIT, see linux/tcp_states.h: the peer has hung up


class HandshakeWatch:
    """Counts the handshakes that a server has ended after its greeting.

    During a handshake it keeps a duplicate of the connection, because libzmq closes its own before
    the event of the end can be read. A handshake whose events are read too late for a duplicate
    does not count. The kernel does not count the bytes of ipc connections; there a handshake that
    ends counts if the service then sends its greeting on another connection.

    :param endpoint: endpoint that the socket connects to
    """

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint
        self._connection: network.socket | None = None
        self._hangups = 0

    def begin(self, fd: int) -> None:
        """Keep a duplicate of a connection until the end of its handshake.

        :param fd: its descriptor in libzmq; it may be that of another file meanwhile
        """
        self.close()
        if self._endpoint.protocol == 'tcp':
            with suppress(OSError):  # it was closed, or no descriptor is left
                self._connection = network.socket(
                    network.AF_UNIX, network.SOCK_STREAM, 0, os.dup(fd)
                )
                peer = self._connection.getpeername()  # text or bytes, of another kind of socket
                if isinstance(peer, tuple) and peer[1] == self._endpoint.port:
                    return
            self.close()

    def fail(self) -> bool:
        """Count a handshake that has ended; return True if the server refuses this client."""
        if self._endpoint.protocol == 'ipc':
            self._hangups = self._hangups + 1 if self._is_greeted() else 0
        elif self._connection is not None:
            received = self._read_received(self._connection)
            if received is not None:
                is_greeting = received in (_BEGINNING + 1, _GREETING, _GREETING + 1)
                self._hangups = self._hangups + 1 if is_greeting else 0
            self.close()
        return self._hangups >= HANGUPS

    def _is_greeted(self) -> bool:
        """Return True if the service at an ipc address replies to a greeting with its own."""
        with (
            suppress(OSError),
            network.socket(network.AF_UNIX, network.SOCK_STREAM) as probe,
        ):
            probe.settimeout(_PROBE_TIMEOUT)
            probe.connect(self._endpoint.unix_name)
            probe.sendall(_CURVE_GREETING)
            received = b''
            while len(received) < _BEGINNING and (data := probe.recv(_GREETING)):
                received += data
            return len(received) >= _BEGINNING and received[:1] == b'\xff'
        return False

    @staticmethod
    def _read_received(connection: network.socket) -> int | None:
        """Return the bytes that came in; None if this is not the connection that has ended."""
        traffic = Traffic.read(connection)
        if traffic is None:
            return None
        state = connection.getsockopt(network.IPPROTO_TCP, network.TCP_INFO, 1)[0]
        return traffic.received if state in _ENDED else None

    def reset(self) -> None:
        """Forget the handshakes that have ended: one has succeeded, or nobody listens."""
        self._hangups = 0
        self.close()

    def close(self) -> None:
        """Close the duplicate."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    __del__ = close
