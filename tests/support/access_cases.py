# SPDX-License-Identifier: ZPL-2.1
"""Combinations of mechanism, address and credentials, and peers that do harm."""

import zmq
import zmq.auth

from handlers import Process
from pyams_zmq.curve import CurveClient, CurveServer

SECRET = 'open:sesame'

ADDRESSES = {
    # bound host, allowed clients, True if this machine may connect
    'tcp, no rule': ('127.0.0.1', None, True),
    'tcp, allowed': ('127.0.0.1', '10.0.0.1, 127.0.0.1', True),
    'tcp, in a network': ('127.0.0.1', '127.0.0.0/8', True),
    'tcp, localhost': ('127.0.0.1', 'localhost', True),
    'tcp, denied': ('127.0.0.1', '10.0.0.1', False),
    'tcp, not in the network': ('127.0.0.1', '10.0.0.0/8 192.168.0.0/16', False),
    'IPv6, allowed': ('[::1]', '::1', True),
    'IPv6, in a network': ('[::1]', '::/64', True),
    'IPv6, denied': ('[::1]', 'fe80::/10', False),
    'IPv4 on an IPv6 socket, allowed': ('[::]', '127.0.0.1', True),
    'IPv4 on an IPv6 socket, denied': ('[::]', '10.0.0.1', False),
    'ipc, no rule': ('ipc', None, True),
    'ipc, localhost': ('ipc', 'localhost', True),
    'ipc, denied': ('ipc', '10.0.0.1', False),
}
MECHANISMS = ('NULL', 'PLAIN', 'CURVE')
CREDENTIALS = {
    # the mechanism for which they are valid
    'none': 'NULL',
    'good password': 'PLAIN',
    'wrong password': None,
    'unknown user': None,
    'good key': 'CURVE',
    'unknown key': None,
    'wrong server key': None,
}


def make_keys(folder):
    """Make keys of the server, of two known clients, and of an unknown client."""
    clients = folder / 'clients'
    clients.mkdir()
    zmq.auth.create_certificates(folder, 'server')
    zmq.auth.create_certificates(folder, 'stranger')
    zmq.auth.create_certificates(clients, 'alice')
    zmq.auth.create_certificates(clients, 'bob')
    return folder


def server_options(mechanism, keys):
    """Options of a process with a mechanism."""
    return {
        'NULL': {},
        'PLAIN': {'auth': {'bob': 'builder', 'alice': SECRET}},
        'CURVE': {'curve': CurveServer(keys / 'server.key_secret', keys / 'clients')},
    }[mechanism]


def client_options(credentials, keys):
    """Options of a socket with credentials."""
    return {
        'none': {},
        'good password': {'auth': f'alice:{SECRET}'},
        'wrong password': {'auth': 'alice:sesame'},
        'unknown user': {'auth': f'eve:{SECRET}'},
        'good key': {
            'curve': CurveClient(keys / 'server.key', keys / 'clients' / 'alice.key_secret')
        },
        'unknown key': {'curve': CurveClient(keys / 'server.key', keys / 'stranger.key_secret')},
        'wrong server key': {
            'curve': CurveClient(keys / 'stranger.key', keys / 'clients' / 'alice.key_secret')
        },
    }[credentials]


class QuickLimits(Process):
    """Drops silent peers after a short time."""

    handshake_timeout = 0.5
    heartbeat_interval = 0.4
    heartbeat_timeout = 0.4


GREETING = b'\xff' + bytes(8) + b'\x7f\x03\x00NULL' + bytes(16) + b'\x00' + bytes(31)
READY = b'\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ\x08Identity\x00\x00\x00\x00'

OLD_GREETINGS = {
    # each with a message, which a peer of that version sends at once
    'ZMTP 1.0': b'\x01\x00' + b'\x01\x01' + b'%c\x00%b',
    'ZMTP 2.0': b'\xff' + bytes(8) + b'\x7f\x01\x03\x00\x00' + b'\x01\x00' + b'\x00%c%b',
    'ZMTP 2.0, first revision': b'\xff' + bytes(8) + b'\x7f\x00\x03\x00\x00' + b'\x01\x00\x00%c%b',
}


def old_peer(version, message):
    """Return what a REQ socket of libzmq before 4 sends: its greeting, and a message."""
    template = OLD_GREETINGS[version]
    size = len(message) + (version == 'ZMTP 1.0')  # there it includes the flags
    return template % (size, message)


HALF_OPEN = {
    'nothing': b'',
    'one byte': b'\xff',
    'HTTP': b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n',
    'TLS': b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(200),
    'SSH': b'SSH-2.0-OpenSSH_9.2\r\n',
    'ZMTP 1.0': b'\x01\x00',
    'ZMTP 2.0': b'\xff' + bytes(8) + b'\x7f\x01\x03\x00\x00',
    'half a greeting': GREETING[:30],
    'greeting': GREETING,
    'greeting, half a command': GREETING + READY[:10],
    'greeting, rubbish': GREETING + bytes(range(200)),
    'half a frame': GREETING + READY + b'\x00\x64half',
    'half a message': GREETING + READY + b'\x01\x00\x01\x04part',
    '1 TB frame': GREETING + READY + b'\x02' + (1 << 40).to_bytes(8, 'big') + b'x',
    'ready, and silent': GREETING + READY,
}


def flood(address, number):
    """Try bad passwords, 50 connections at a time."""
    with zmq.Context() as context:
        for _ in range(number // 50):
            sockets = []
            for _ in range(50):
                socket = context.socket(zmq.DEALER)
                sockets.append(socket)
                socket.linger = 0
                socket.plain_username, socket.plain_password = b'alice', b'wrong'
                if len(sockets) == 50:
                    monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
                socket.connect(address)
            assert monitor.poll(10_000)
            sockets[-1].disable_monitor()
            monitor.close()
            for socket in sockets:
                socket.close()
