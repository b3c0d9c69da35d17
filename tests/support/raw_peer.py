# SPDX-License-Identifier: ZPL-2.1
"""A peer that speaks ZMTP 3.0 (RFC 23) or 3.1 (RFC 37) itself, to do what libzmq does not do."""

import ctypes
import json
import socket as network
import struct

from checks import TIMEOUT

PING = b'\4PING\0\0'
"""Body of a heartbeat, see RFC 37/ZMTP"""

_LONG = 255


def greeting(mechanism=b'NULL', minor=0):
    """Greeting of a client."""
    version = bytes([3, minor])
    return b'\xff' + bytes(8) + b'\x7f' + version + mechanism.ljust(20, b'\0') + bytes(32)


def header(size, *, more=False, command=False):
    """Header of a frame of this size."""
    flags = more | command << 2
    if size <= _LONG:
        return bytes([flags, size])
    return bytes([flags | 2]) + struct.pack('>Q', size)


def frame(data, **flags):
    """A frame, or with `command=True` a command."""
    return header(len(data), **flags) + data


def message(*frames):
    """A message of some frames."""
    return b''.join(frame(each, more=each is not frames[-1]) for each in frames)


def request(name, args=None):
    """A request, as a REQ socket sends it."""
    return message(b'', json.dumps([name, args]).encode())


def metadata(kind, identity):
    """Metadata of a READY: type of the socket, and its name."""
    return b''.join(
        bytes([len(name)]) + name + struct.pack('>I', len(value)) + value
        for name, value in ((b'Socket-Type', kind), (b'Identity', identity))
    )


class RawPeer:
    """A TCP connection to or from a ØMQ socket; as a context manager it is closed at the end.

    :param address: as in `bound_address`; None with *sock*
    :param sock: a connection that was accepted
    :param minor: minor version of ZMTP
    :param auth: `user:password`, for the mechanism PLAIN
    :param handshake: false to send nothing by itself
    :param receive_buffer: bytes that the system keeps for this end, at most
    """

    def __init__(
        self,
        address,
        *,
        sock=None,
        minor=0,
        auth=None,
        kind=b'DEALER',
        identity=b'',
        handshake=True,
        receive_buffer=None,
    ):
        self.socket = network.socket() if sock is None else sock
        self.socket.settimeout(TIMEOUT)
        self._minor = minor
        if receive_buffer is not None:
            self.socket.setsockopt(network.SOL_SOCKET, network.SO_RCVBUF, receive_buffer)
        if address is not None:
            host, port = address.removeprefix('tcp://').rsplit(':', 1)
            self.socket.connect((host, int(port)))
        self.file = self.socket.makefile('rb')
        if handshake:
            self._shake_hands(auth, metadata(kind, identity))

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.file.close()
        self.socket.close()

    def _shake_hands(self, auth, metadata):
        self.send(greeting(b'NULL' if auth is None else b'PLAIN', self._minor))
        assert len(self.file.read(64)) == 64
        if auth is None:
            self.send(frame(b'\x05READY' + metadata, command=True))
        else:
            user, password = (bytes([len(text)]) + text.encode() for text in auth.split(':'))
            self.send(frame(b'\x05HELLO' + user + password, command=True))
            assert self._read_frame()[1].startswith(b'\x07WELCOME')
            self.send(frame(b'\x08INITIATE' + metadata, command=True))
        assert self._read_frame()[1].startswith(b'\x05READY')

    def send(self, data):
        """Send bytes, as they are."""
        self.socket.sendall(data)

    def _read_frame(self):
        flags, size = self.file.read(2)
        if flags & 2:
            [size] = struct.unpack('>Q', bytes([size]) + self.file.read(7))
        return flags, self.file.read(size)

    def read_frames(self):
        """Return the frames of the next message."""
        frames = []
        flags = 1
        while flags & 5:
            flags, data = self._read_frame()
            frames += [] if flags & 4 else [data]
        return frames

    def read_reply(self):
        """Return the last frame of the next message, decoded."""
        return json.loads(self.read_frames()[-1])

    def ask(self, name, args=None):
        """Return the reply to a request."""
        self.send(request(name, args))
        return self.read_reply()

    def wait_end(self):
        """Read until the other end has closed the connection."""
        try:
            while self.file.read1():
                pass
        except ConnectionError:
            pass

    def has_ended(self):
        """Return True if the other end has closed the connection; what it has sent is lost."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(65536):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        finally:
            self.socket.settimeout(TIMEOUT)
        return True

    def reset(self):
        """End the connection as the system does for a process that is killed."""
        self.socket.setsockopt(network.SOL_SOCKET, network.SO_LINGER, struct.pack('ii', 1, 0))
        self.file.close()
        self.socket.close()

    def vanish(self):
        """Answer nothing any more, as a host without power: a filter drops what comes in."""
        code = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0))  # "return 0"
        program = struct.pack('HL', 1, ctypes.addressof(code))
        self.socket.setsockopt(network.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
