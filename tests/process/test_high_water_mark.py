# SPDX-License-Identifier: ZPL-2.1
"""A peer ends with more messages waiting than the high-water mark: its server goes on.

If libzmq has stopped reading from the connection then, a heartbeat of ZMTP aborts the process: one
of its own at the next interval, one of the peer when libzmq reads on.
"""

import socket as network
import struct
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import zmq

from checks import TIMEOUT, wait_until
from devices import make_device
from handlers import Process
from peers import raw_server
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import ProcessDevice
from raw_peer import PING, RawPeer, frame, greeting, message, metadata, request

MANY = 200  # messages, more than the high-water mark


class LowMark(Process):
    """Stops reading early; the checks of its peers are short."""

    receive_hwm = 10
    heartbeat_interval = 0.3
    heartbeat_timeout = 0.3


SEND = f"""
import sys, zmq
context = zmq.Context()
socket = context.socket(zmq.DEALER)
socket.sndhwm = 0
socket.connect(sys.argv[1])
for number in range({MANY}):
    socket.send_multipart([b'', b'["echo", 1]'])
print('sent', flush=True)
sys.stdin.read(1)
context.destroy(linger=int(sys.argv[2]))
"""


def end_raw(address):
    """Send messages by hand; then reset the connection."""
    peer = RawPeer(address)
    peer.send(request('echo', 1) * MANY)
    return peer.reset


def end_pinging(address):
    """Send a heartbeat after each message; then reset the connection."""
    peer = RawPeer(address)
    peer.send((request('echo', 1) + frame(PING, command=True)) * MANY)
    return peer.reset


def end_killed(address):
    """Send messages with libzmq; then the client is killed."""
    return _start_client(address, 0).kill


def end_closed(address):
    """Send messages with libzmq; then the client closes its socket and ends."""
    return _start_client(address, 100).stdin.close


_clients = []


def _start_client(address, linger):
    client = subprocess.Popen(
        [sys.executable, '-c', SEND, address, str(linger)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    _clients.append(client)
    assert client.stdout.readline() == b'sent\n'
    return client


@pytest.fixture
def _no_clients():
    """End the clients that were started."""
    yield
    while _clients:
        client = _clients.pop()
        client.stdin.close()
        client.stdout.close()
        client.wait(TIMEOUT)


@pytest.mark.usefixtures('_no_clients')
@pytest.mark.parametrize('end', [end_raw, end_pinging, end_killed, end_closed])
@pytest.mark.parametrize('protocol', ['tcp', 'ipc'])
def test_process(protocol, end, start, tmp_path):
    if protocol == 'ipc' and end in (end_raw, end_pinging):
        pytest.skip('RawPeer speaks TCP')
    process = start(
        '127.0.0.1' if protocol == 'tcp' else f'ipc://{tmp_path}/socket', factory=LowMark
    )
    path = tmp_path / 'wait'
    with (
        zmq.Context() as context,
        context.socket(zmq.DEALER) as busy,
        ZMQClient(process.bound_address, timeout=TIMEOUT) as client,
    ):
        busy.connect(process.bound_address)
        busy.send_multipart([b'', f'["wait_for", "{path}"]'.encode()])
        wait_until(path.exists)
        stop = end(process.bound_address)
        assert not busy.poll(100)  # meanwhile libzmq reads until the high-water mark
        stop()
        assert not busy.poll(2000)  # more than six heartbeats of 0.3 s
        path.unlink()
        assert busy.poll(TIMEOUT * 1000)
        assert client.call('pid') == process.pid


def test_replies_that_wait(start):
    """None is lost, though the peer reads late; a loaded machine has the same effect."""
    process = start()
    with RawPeer(process.bound_address, receive_buffer=4096) as peer:
        call = request('big', 4000)
        peer.send(call * 4000)
        with ZMQClient(process.bound_address, timeout=TIMEOUT) as client:
            wait_until(lambda: client.call('echo', 1) == 1)
            threading.Event().wait(1)  # meanwhile the replies wait: no event tells that
        for _ in range(4000):
            status, text = peer.read_reply()
            assert (status, len(text)) == (200, 4000)


def answer_and_ping(connection):
    """Answer a call more often than asked, with a heartbeat each time; then reset."""
    with connection, connection.makefile('rb') as file:
        connection.sendall(greeting() + frame(b'\5READY' + metadata(b'ROUTER', b''), command=True))
        file.read(64)
        size = file.read(2)[1]
        file.read(size)  # READY
        file.read(len(request('echo', 1)))
        answer = message(b'', b'[200, 1]') + frame(PING, command=True)
        with suppress(OSError):
            connection.sendall(answer * 3000)
        threading.Event().wait(0.3)  # meanwhile libzmq reads
        connection.setsockopt(network.SOL_SOCKET, network.SO_LINGER, struct.pack('ii', 1, 0))


CALLS = """
import sys, time
from pyams_zmq.socket import zmq_response, zmq_socket

for _number in range(2):
    with zmq_socket(sys.argv[1]) as socket:
        for _call in range(3):
            socket.send_json(['echo', 1])
            zmq_response(socket, timeout=1)
            time.sleep(0.7)  # the reset comes in meanwhile; a client that waits is not told
"""


def test_client():
    """A service sends replies that nobody waits for."""
    with raw_server(answer_and_ping) as address:
        subprocess.run([sys.executable, '-c', CALLS, address], check=True)


@pytest.mark.usefixtures('_no_clients')
@pytest.mark.parametrize(
    ('end', 'mark'), [(end_raw, 10), (end_killed, 10), (end_closed, 10), (end_pinging, 0)]
)
def test_device_without_a_worker(end, mark):
    """It serves the worker that comes later."""
    device = make_device(ProcessDevice, options=[('out', zmq.SNDHWM, 10)])
    device.receive_hwm = mark
    device.heartbeat_interval = device.heartbeat_timeout = 0.3
    with device, zmq.Context() as context, context.socket(zmq.DEALER) as worker:
        stop = end(device.in_address)
        assert not worker.poll(100)  # meanwhile libzmq reads until the high-water mark
        stop()
        assert not worker.poll(2000)  # more than six heartbeats of 0.3 s
        worker.connect(device.out_address)
        with RawPeer(device.in_address) as peer:
            peer.send(request('echo', 2))
            frames = [b'']
            while frames[-1] != b'["echo", 2]':
                assert worker.poll(TIMEOUT * 1000)
                frames = worker.recv_multipart()
            worker.send_multipart([*frames[:-1], b'[200, 2]'])
            assert peer.read_reply() == [200, 2]
