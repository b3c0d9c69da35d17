# SPDX-License-Identifier: ZPL-2.1
"""Questions to all services at once, in threads that do not accumulate."""

import subprocess
import sys
import threading

import pytest

import pyams_zmq.monitor.question
from checks import TIMEOUT, fail_to_start, in_fork, wait_until
from pyams_zmq.exceptions import (
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.monitor.inquiry import ask_all
from pyams_zmq.monitor.question import Question
from watched_services import PASSWORD, PING

WAITS = """
import threading
from pyams_zmq.monitor.question import Question

Question(None, 'it', threading.Event().wait, 60).start()
print('end')
"""


def test_all_services(services):
    services.add_all()
    services.config.commit()
    answers = ask_all(services.config.registry, 'pyams_zmq.ping', 3)
    assert list(answers) == sorted(answers)
    assert answers['up'].result == PING
    assert answers['up'].error is answers['up'].exception is None
    assert answers['draining'].result['state'] == 'draining'
    kinds = {name: type(answer.exception) for name, answer in answers.items() if answer.error}
    assert kinds == {
        'down': ZMQUnreachableError,
        'hung': ZMQUnreachableError,
        'old': ZMQRemoteError,
        'refusing': ZMQRefusedError,
        'stopping': ZMQRemoteError,
        'withdrawn': ZMQRemoteError,
    }
    assert 'pyams_zmq serve INI down' in answers['down'].error  # the advice of a client
    assert PASSWORD not in str(answers)
    assert all(answer.seconds > 0 for answer in answers.values())
    assert all('\n' not in answer.error for answer in answers.values() if answer.error)


def test_some_services(services):
    services.answer('one', ping=[200, 1])
    services.answer('two', ping=[200, 2])
    services.config.commit()
    answers = ask_all(services.config.registry, 'pyams_zmq.ping', 20, names=['two', 'three'])
    assert list(answers) == ['two', 'three']
    assert answers['two'].result == 2
    assert answers['three'].error.startswith("Unknown ØMQ service 'three'; declared: one, two.")


def test_recorded_services(services):
    services.declare('converter')
    services.config.include('pyams_zmq.testing')
    services.config.commit()
    assert ask_all(services.config.registry, 'pyams_zmq.ping')['converter'].error is None


def test_fork_while_a_service_is_asked(services):
    """A worker of a preforking server that is started meanwhile can ask, too."""
    services.answer('up', ping=[200, PING])
    services.declare('down')
    services.config.commit()
    registry = services.config.registry
    thread = threading.Thread(target=ask_all, args=(registry, 'pyams_zmq.ping', 3, ['down']))
    thread.start()
    wait_until(lambda: any(isinstance(each, Question) for each in threading.enumerate()))

    def check():
        assert ask_all(registry, 'pyams_zmq.ping', 20, ['up'])['up'].result == PING

    assert in_fork(check) == 0
    thread.join()


# Threads


@pytest.fixture
def gate():
    """Return an event for which questions wait; it is set at the end."""
    event = threading.Event()
    yield event
    event.set()


def ask(function, owner=None, timeout=20):
    """Ask a question; return it, and the answer."""
    question = Question(owner, 'it', function, timeout)
    question.start()
    return question, question.wait()


@pytest.fixture
def overdue(gate, monkeypatch):
    """Return a question whose thread goes on after its time."""
    monkeypatch.setattr(pyams_zmq.monitor.question, 'SLACK', 0)
    question, answer = ask(gate.wait, timeout=0.01)
    assert question.is_alive()
    assert isinstance(answer.exception, ZMQTimeoutError)
    assert answer.error == 'it has not answered within 0.01 s'
    return question


def test_overdue_question_is_not_asked_again(overdue, gate):
    question, answer = ask(gate.is_set)
    assert question.ident is None  # its thread was not started
    assert answer.error == 'it has not answered within 20 s'
    assert ask(gate.is_set, owner=gate)[1].result is False  # another application
    gate.set()
    overdue.join()
    assert ask(gate.is_set)[1].result is True


def test_late_answer(overdue, gate):
    gate.set()
    wait_until(lambda: overdue.wait().result)


@pytest.mark.usefixtures('overdue')
def test_fork_has_no_overdue_question():
    def check():
        assert ask(lambda: 'here')[1].result == 'here'

    assert in_fork(check) == 0


def test_end_of_the_program_does_not_wait():
    assert subprocess.check_output([sys.executable, '-c', WAITS], timeout=TIMEOUT) == b'end\n'


def test_limit_of_threads(monkeypatch):
    monkeypatch.setattr(threading.Thread, 'start', fail_to_start)
    assert ask(int)[1].error == "can't start new thread"


def test_error_without_text():
    def fail():
        raise LookupError

    answer = ask(fail)[1]
    assert answer.error == 'LookupError'
    assert answer.exception.__traceback__ is None
