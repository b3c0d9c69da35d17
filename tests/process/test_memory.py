# SPDX-License-Identifier: ZPL-2.1
"""With the default limits, no single peer makes a process grow by more than 256 MiB."""

import threading
from contextlib import suppress

import pytest

from checks import Growth, wait_until
from handlers import LoggedProcess
from raw_peer import RawPeer, frame, greeting, header, message, request

MIB = 2**20
TOTAL = 1200  # MiB that the peer tries to send, or to have sent


def send(peer, data, times):
    """Send data until that, or the end of the connection."""
    peer.socket.settimeout(5)  # the peer may not read any more
    with suppress(ConnectionError, TimeoutError):
        for _ in range(times):
            peer.send(data)


@pytest.mark.slow
@pytest.mark.parametrize('auth', [None, 'user:secret'])
@pytest.mark.parametrize('size', [1000, 100_000, 10 * MIB])
def test_messages_while_the_process_works(size, auth, start, tmp_path):
    process = start(**({'auth': auth} if auth else {}))
    path = tmp_path / 'wait'
    with RawPeer(process.bound_address, auth=auth) as busy:
        busy.send(request('wait_for', str(path)))
        wait_until(path.exists)
        with RawPeer(process.bound_address, auth=auth) as peer, Growth(process) as growth:
            data = request('echo', 'x' * size)
            block = data * max(1, MIB // len(data))
            send(peer, block, TOTAL * MIB // len(block))
        path.unlink()
        assert busy.read_reply() == [200, str(path)]
        assert busy.ask('echo', 1) == [200, 1]
    assert growth.peak < 256 * MIB


@pytest.mark.slow
@pytest.mark.parametrize('size', [255, 64 * 1024, 10 * MIB])
def test_message_that_does_not_end(size, start):
    process = start()
    with RawPeer(process.bound_address) as peer, Growth(process) as growth:
        block = frame(bytes(size), more=True) * max(1, MIB // size)
        send(peer, block, TOTAL * MIB // len(block))
        with RawPeer(process.bound_address) as other:
            assert other.ask('echo', 1) == [200, 1]
    assert growth.peak < 256 * MIB


SMALL = {
    'empty frames': frame(b'', more=True),
    'short frames': frame(b'x' * 20, more=True),
    'messages': message(b'', b'x'),
}


@pytest.mark.parametrize(
    'small',
    [
        'empty frames',
        pytest.param('short frames', marks=pytest.mark.slow),
        pytest.param('messages', marks=pytest.mark.slow),
    ],
)
def test_small_frames(small, start, tmp_path):
    """They take up to 32 times their size in libzmq."""
    log = tmp_path / 'log'
    process = start(log, factory=LoggedProcess)
    path = tmp_path / 'wait'
    with RawPeer(process.bound_address) as busy, RawPeer(process.bound_address) as peer:
        busy.send(request('wait_for', str(path)))
        wait_until(path.exists)
        with Growth(process) as growth:
            block = SMALL[small] * (MIB // len(SMALL[small]))
            send(peer, block, 60)
            wait_until(lambda: 'small frames that waited' in log.read_text())
        path.unlink()
        assert busy.read_reply() == [200, str(path)]
        assert busy.ask('echo', 1) == [200, 1]
    assert growth.peak < 256 * MIB


@pytest.mark.slow
def test_envelopes(start):
    """Each reply repeats that of its message."""
    process = start()
    call = frame(bytes(15 * MIB), more=True) + request('echo', 1)
    with RawPeer(process.bound_address) as peer, Growth(process) as growth:
        peer.socket.settimeout(5)
        with suppress(ConnectionError, TimeoutError):
            for _ in range(60):
                peer.send(call)
                threading.Event().wait(0.1)  # so that the calls do not wait
    assert growth.peak < 256 * MIB


@pytest.mark.slow
@pytest.mark.parametrize('size', [100_000, MIB, 10 * MIB])
def test_replies_that_are_not_read(size, start, tmp_path):
    log = tmp_path / 'log'
    process = start(log, factory=LoggedProcess)
    with RawPeer(process.bound_address) as peer, Growth(process) as growth:
        send(peer, request('big', size), TOTAL * MIB // size)
        wait_until(lambda: 'bytes waited to be sent (send_size)' in log.read_text())
    assert growth.peak < 256 * MIB


@pytest.mark.slow
def test_small_replies_that_are_not_read(start):
    """Their number is limited, too: each takes more than its size."""
    process = start()
    with RawPeer(process.bound_address, receive_buffer=4096) as peer, Growth(process) as growth:
        send(peer, request('echo', 'x' * 100) * 1000, 500)
        with RawPeer(process.bound_address) as other:
            assert other.ask('echo', 1) == [200, 1]
    assert growth.peak < 256 * MIB


@pytest.mark.slow
@pytest.mark.parametrize('hello', [b'', b'\5HELLO\4user\5wrong'], ids=['nothing', 'wrong'])
def test_bytes_without_credentials(hello, start):
    """Many connections, each with a command that does not end, also after a refusal."""
    process = start(auth='user:secret')

    def flood():
        with RawPeer(process.bound_address, handshake=False) as peer:
            send(peer, greeting(b'PLAIN'), 1)
            if hello:
                send(peer, frame(hello, command=True), 1)
                peer.file.read(64 + 11)  # the greeting and the refusal
            send(peer, header(30 * MIB, command=True), 1)
            send(peer, bytes(MIB), 30)

    with Growth(process) as growth:
        threads = [threading.Thread(target=flood) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert growth.peak < 256 * MIB
    with RawPeer(process.bound_address, auth='user:secret') as peer:
        assert peer.ask('echo', 1) == [200, 1]
