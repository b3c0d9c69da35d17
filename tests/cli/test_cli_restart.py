# SPDX-License-Identifier: ZPL-2.1
"""`pyams_zmq reload` and `pyams_zmq restart`."""

import json
from functools import partial
from threading import Thread

import pytest
import zmq

from checks import wait_until

OK = [200, None]


def workers(*pids):
    """Return statistics with these workers."""
    return [200, {'workers': [{'host': 'h', 'pid': pid} for pid in pids]}]


def test_reload(run, answer):
    target = answer(reload=OK)
    assert run('reload', *target) == (0, f'{target[1]} reads its users and keys again\n', '')


def test_restart(run, answer):
    """It waits until each worker has been replaced, and as many are there as before."""
    steps = [workers(1, 2), workers(2), workers(2, 3), workers(3), workers(4, 3)]
    target = answer(stats=steps, restart=OK)
    assert run('restart', *target) == (0, f'{target[1]}: pid 1, 2 replaced by pid 3, 4\n', '')


def test_restart_of_a_process(run):
    """The connection is lost, and nobody listens for a moment."""
    context = zmq.Context()
    former, later = (context.socket(zmq.ROUTER) for _ in range(2))
    port = former.bind_to_random_port('tcp://127.0.0.1')

    def serve():
        for reply in (workers(1), OK):
            answer_next(former, reply)
        former.recv_multipart()
        former.close()
        wait_until(partial(bind, later, port))
        answer_next(later, workers(2))

    thread = Thread(target=serve)
    thread.start()
    try:
        result = run('restart', '--address', f'127.0.0.1:{port}')
    finally:
        thread.join()
        later.close()
        context.term()
    assert result == (0, f'127.0.0.1:{port}: pid 1 replaced by pid 2\n', '')


def answer_next(socket, reply):
    """Receive a question, and reply to it."""
    *envelope, _data = socket.recv_multipart()
    socket.send_multipart([*envelope, json.dumps(reply).encode()])


def bind(socket, port):
    """Return True when the address of a socket that was closed is free."""
    try:
        socket.bind(f'tcp://127.0.0.1:{port}')
    except zmq.ZMQError:
        return False
    return True


@pytest.mark.parametrize(
    ('present', 'problem'),
    [
        (workers(1, 2, 3), 'pid 1, 2 not replaced within 0.3 s: they finish their calls first'),
        (workers(2, 3), 'pid 2 not replaced within 0.3 s: they finish their calls first'),
        (workers(3), 'pid 1, 2 ended, but only pid 3 there after 0.3 s: see the log'),
        (workers(), 'pid 1, 2 ended, but only pid none there after 0.3 s: see the log'),
        ([504, 'x'], None),
    ],
)
def test_restart_that_takes_too_long(run, answer, present, problem):
    target = answer(stats=[workers(1, 2), present], restart=OK)
    code, out, err = run('restart', *target, '--timeout', '0.3')
    assert (code, out) == (5, '')
    if problem is not None:
        assert err.startswith(f'pyams_zmq: error: {target[1]}: {problem}')
    else:
        assert err == 'pyams_zmq: error: 504 x\n'


def test_restart_of_a_service_without_supervisor(run, answer):
    target = answer(stats=workers(1), restart=[409, 'x has no supervisor'])
    assert run('restart', *target) == (1, '', 'pyams_zmq: error: 409 x has no supervisor\n')


@pytest.mark.parametrize('stats', [{}, {'workers': 1}, {'workers': [{'host': 1, 'pid': 'x'}]}])
def test_restart_without_a_list_of_workers(run, answer, stats):
    target = answer(stats=[200, stats])
    assert run('restart', *target) == (
        1,
        '',
        f'pyams_zmq: error: The statistics of {target[1]} do not list workers\n',
    )
