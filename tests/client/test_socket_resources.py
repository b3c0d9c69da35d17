# SPDX-License-Identifier: ZPL-2.1
"""What sockets of clients leave behind: descriptors, threads, warnings and forks."""

import ctypes
import gc
import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import zmq

from checks import open_fds, running_threads, wait_until
from handlers import Process
from peers import ECHO, REPLY, ask_raw
from pyams_zmq.client import socket as socket_module
from pyams_zmq.client.socket import ZMQSocket, get_context, zmq_response, zmq_socket
from pyams_zmq.wire.linger import CLOSE_LINGER

FORK = multiprocessing.get_context('fork')


STRICT = (
    *('-X', 'dev', '-W', 'error'),
    # What Pyramid and Paste warn of.
    *('-W', 'ignore:pkg_resources is deprecated', '-W', 'ignore:Deprecated call to'),
)


def run_in_child(function):
    """Run a function in a fork; fail if it fails."""
    child = FORK.Process(target=function)
    child.start()
    child.join(20)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    assert code == 0


def run_strictly(program, address):
    """Run a program in which every warning is an error."""
    return subprocess.run(
        [sys.executable, *STRICT, '-c', program, address],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def rss():
    """Resident memory in KiB."""
    with open('/proc/self/status', encoding='ascii') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmRSS'))


# What is left behind


def cycle(address, count, auth=None):
    for _ in range(count):
        socket = zmq_socket(address, auth=auth)
        socket.send_json(ECHO)
        assert zmq_response(socket) == REPLY


@pytest.mark.parametrize(
    'count', [1000, pytest.param(10_000, marks=pytest.mark.slow)], ids='{} cycles'.format
)
@pytest.mark.parametrize('auth', [None, 'user:password'])
def test_nothing_is_left(start, tmp_path, count, auth):
    """After many cycles of connect, call and drop, over ipc because TCP would run out of ports."""
    process = start(f'ipc://{tmp_path}/socket', auth=auth)
    cycle(process.bound_address, count, auth)  # memory grows at first, up to a limit
    gc.collect()
    fds, threads = open_fds(), running_threads()
    growths = []
    for _ in range(3):  # a leak grows each time; closed sockets that libzmq frees late, once
        memory = rss()
        cycle(process.bound_address, count, auth)
        gc.collect()
        wait_until(lambda: open_fds() <= fds)
        assert running_threads() <= threads
        growths.append(rss() - memory)
        if growths[-1] < 2048:
            break
    assert min(growths) < 2048


def test_nothing_is_left_by_failures(start, down):
    process = start(auth='user:password')
    for _ in range(2):
        gc.collect()
        fds, threads = open_fds(), running_threads()
        for _ in range(10):
            assert ask_raw(process.bound_address)[0] == 401
            assert ask_raw(process.bound_address, auth='user:x')[0] == 401
            assert ask_raw(down, 0.02)[0] == 503
    gc.collect()
    wait_until(lambda: open_fds() <= fds)
    assert running_threads() <= threads


class WideProcess(Process):
    """Takes more clients than a context of libzmq has sockets by default."""

    max_connections = 2000


def test_many_sockets_at_once(start):
    """More than libzmq's default for a context, which is 1023."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 8192:
        pytest.skip('this user may not open so many files')
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, before[1]))
    try:
        process = start(factory=WideProcess)
        opened = [zmq_socket(process.bound_address) for _ in range(1200)]
        opened[-1].send_json(ECHO)
        assert zmq_response(opened[-1]) == REPLY
        opened.clear()
    finally:
        wait_until(lambda: len(open_fds()) < before[0] // 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize('is_asked', [False, True])
def test_no_warning(start, is_asked):
    process = start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        socket = zmq_socket(process.bound_address)
        if is_asked:
            socket.send_json(['sleep', 0.05])
            assert zmq_response(socket)[0] == 200
        del socket
        gc.collect()
    assert not [str(item.message) for item in caught]


def test_dropped_is_closed(down):
    fds = open_fds()
    socket = zmq_socket(down)
    assert open_fds() - fds
    with socket:
        pass
    assert socket.closed
    del socket
    wait_until(lambda: open_fds() <= fds)


@pytest.mark.parametrize('linger', [None, 0])
def test_close_while_messages_of_many_frames_are_sent(linger):
    """In another process: libzmq aborts it if a half sent message is dropped at once."""
    program = f"""
    import zmq
    from pyams_zmq.socket import zmq_socket

    context = zmq.Context()
    for socket_type in [zmq.DEALER, zmq.REQ] * 25:
        with context.socket(zmq.ROUTER) as server:
            server.linger = 0
            port = server.bind_to_random_port('tcp://127.0.0.1')
            sockets = [zmq_socket(f'127.0.0.1:{{port}}', socket_type) for _ in range(5)]
            for socket in sockets:
                for _ in range(100 if socket_type == zmq.DEALER else 1):
                    socket.send_multipart([b'x' * 9000] * 10)
            server.poll(1000)
            for socket in sockets:
                socket.close({linger})
    """
    subprocess.run([sys.executable, '-c', textwrap.dedent(program)], check=True, timeout=60)


SUSPENDED = """
import os, signal, subprocess, sys, zmq
from pyams_zmq.socket import zmq_socket

server = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True)
socket = zmq_socket('127.0.0.1:' + server.stdout.readline().strip(), zmq.DEALER)
socket.send_multipart([b'1', b'2'])
assert server.stdout.readline() == 'received\\n'
os.kill(server.pid, signal.SIGSTOP)
while socket.poll(100, zmq.POLLOUT):  # until the system buffers no more
    socket.send_multipart([b'x' * 2000] * 10)
suspend = f'read line; kill -STOP {os.getpid()}; kill -9 {server.pid}; sleep 0.3'
resume = f'kill -CONT {os.getpid()}; sleep 0.3'
with subprocess.Popen(['sh', '-c', f'{suspend}; {resume}'], stdin=subprocess.PIPE) as shell:
    socket.close(int(sys.argv[2]))
    shell.stdin.write(b'\\n')
"""

PUSHED_BACK = """
import signal, zmq

socket = zmq.Context().socket(zmq.ROUTER)
socket.rcvhwm = 1
print(socket.bind_to_random_port('tcp://127.0.0.1'), flush=True)
socket.poll()
print('received', flush=True)
signal.pause()
"""


@pytest.mark.parametrize('linger', ['0', '17'])
def test_close_before_a_suspension(linger):
    """The thread of libzmq finds the end of the linger period and of the connection at once."""
    program = [sys.executable, '-c', SUSPENDED, PUSHED_BACK, linger]
    subprocess.run(program, check=True, timeout=60)


@pytest.mark.parametrize(
    ('linger', 'expected'), [(0, CLOSE_LINGER), (17, CLOSE_LINGER), (2000, 2000), (-1, -1)]
)
def test_linger_of_messages_of_many_frames(down, linger, expected):
    with zmq_socket(down, linger=linger) as socket:
        socket.send_multipart([b'1', b'2'])
        assert socket.linger == expected
        socket.linger = 0  # else the context waits for ever for the last one


def test_shadow(down):
    """A shadow of a socket does not own it."""
    socket = zmq_socket(down)
    shadow = ZMQSocket(shadow=socket)
    assert shadow.underlying == socket.underlying
    del shadow
    gc.collect()
    assert not socket.closed


def test_program_that_ends(start):
    """A program with open sockets and a pending message ends without output and without delay."""
    process = start()
    program = (
        'import sys\n'
        'from pyams_zmq.socket import zmq_response, zmq_socket\n'
        'kept = [zmq_socket(sys.argv[1]) for _ in range(3)]\n'
        'kept[0].send_json(["echo", 1])\n'
        'print(zmq_response(kept[0]))\n'
        'kept[1].send_json(["sleep", 0.1])\n'
    )
    result = run_strictly(program, process.bound_address)
    assert (result.returncode, result.stdout, result.stderr) == (0, '[200, 1]\n', '')


# Threads


def test_threads_share_one_context(start):
    process = start()
    get_context().destroy(0)  # so that all of them want to make one
    barrier = threading.Barrier(30)
    contexts, replies = [], []

    def run():
        barrier.wait(5)
        socket = zmq_socket(process.bound_address)
        contexts.append(socket.context)
        socket.send_json(ECHO)
        replies.append(zmq_response(socket))

    threads = [threading.Thread(target=run) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(map(id, contexts))) == 1
    assert replies == [REPLY] * 30


def test_other_contexts_are_left_alone(start):
    """The shared context is not the global one of pyzmq."""
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    assert get_context() is not zmq.Context.instance()
    zmq.Context.instance().term()
    assert ask_raw(process.bound_address) == REPLY


# Forks


def test_fork_while_the_lock_is_held(start):
    process = start()
    assert ask_raw(process.bound_address) == REPLY
    held, release = threading.Event(), threading.Event()

    def hold():
        with socket_module._shared_context.get()._lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(5)

    def run():
        assert ask_raw(process.bound_address) == REPLY

    try:
        run_in_child(run)
    finally:
        release.set()
        thread.join(5)


def test_fork_has_its_own_context(start):
    process = start()
    socket = zmq_socket(process.bound_address)
    parent_context = socket.context

    def run():
        child_socket = zmq_socket(process.bound_address)
        assert child_socket.context is not parent_context
        assert zmq_socket(process.bound_address).context is child_socket.context
        child_socket.send_json(ECHO)
        assert zmq_response(child_socket) == REPLY

        def run_in_grandchild():
            grandchild_socket = zmq_socket(process.bound_address)
            assert grandchild_socket.context not in (child_socket.context, parent_context)
            grandchild_socket.send_json(ECHO)
            assert zmq_response(grandchild_socket) == REPLY

        run_in_child(run_in_grandchild)
        child_socket.send_json(ECHO)
        assert zmq_response(child_socket) == REPLY

    run_in_child(run)
    assert get_context() is parent_context
    socket.send_json(ECHO)
    assert zmq_response(socket) == REPLY


def test_fork_drops_inherited_sockets(start):
    """The parent's sockets still work: idle ones, and one that waits for a reply."""
    process = start()
    kept = [zmq_socket(process.bound_address) for _ in range(5)]
    kept[0].send_json(['sleep', 0.2])
    kept[1].send_json(ECHO)
    assert zmq_response(kept[1]) == REPLY

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            kept[2].close()
            kept.clear()
            gc.collect()
        assert ask_raw(process.bound_address) == REPLY

    for _ in range(3):
        run_in_child(run)
    assert zmq_response(kept[0]) == [200, 0.2]
    for socket in kept:
        socket.send_json(ECHO)
        assert zmq_response(socket) == REPLY


def test_fork_while_threads_call(start):
    process = start()
    end, errors, counts = threading.Event(), [], []

    def talk():
        count = 0
        while not end.is_set():
            if ask_raw(process.bound_address) != REPLY:
                errors.append(count)
            count += 1
        counts.append(count)

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()

    def run():
        for _ in range(3):
            assert ask_raw(process.bound_address) == REPLY
        gc.collect()

    try:
        for _ in range(5):
            run_in_child(run)
    finally:
        end.set()
        for thread in threads:
            thread.join(10)
    assert not errors
    assert min(counts) > 0


def test_fork_that_ends_as_a_program(start):
    """The fork runs its exit handlers, and has the sockets of its parent."""
    process = start()
    program = (
        'import os, sys\n'
        'from pyams_zmq.socket import zmq_response, zmq_socket\n'
        'kept = zmq_socket(sys.argv[1])\n'
        'kept.send_json(["sleep", 0.2])\n'
        'if os.fork() == 0:\n'
        '    own = zmq_socket(sys.argv[1])\n'
        '    own.send_json(["echo", "child"])\n'
        '    print(zmq_response(own))\n'
        '    sys.exit(0)\n'
        'status = os.wait()[1]\n'
        'print(zmq_response(kept), status)\n'
    )
    result = run_strictly(program, process.bound_address)
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout == "[200, 'child']\n[200, 0.2] 0\n"


def test_fork_has_no_threads_of_libzmq():
    """The fork does not create a context; the first socket does."""
    zmq_socket('127.0.0.1:9')

    def run():
        assert len(os.listdir('/proc/self/task')) == 1
        assert ctypes.pythonapi.PyOS_getsig  # the interpreter is whole
        zmq_socket('127.0.0.1:9')
        assert len(os.listdir('/proc/self/task')) > 1

    run_in_child(run)
