# SPDX-License-Identifier: ZPL-2.1
"""Errors of `request.zmq(name)`: each names the service, how it is started, and the next step."""

import pickle
import re
import shlex
import threading
import time
from types import SimpleNamespace

import pytest
import transaction
import zmq
from pyramid.request import Request, apply_request_extensions

from app.program import WebServer, reserved_port
from checks import TIMEOUT, wait_until
from pyams_zmq.config import services_of
from pyams_zmq.config.advice import advise
from pyams_zmq.exceptions import (
    ZMQBacklogError,
    ZMQClosedError,
    ZMQJobError,
    ZMQMessageError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQStartError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)
from pyams_zmq.testing import running
from transaction_checks import Journal

SECRET = 'hush-hush'
WRONG = 'plain_handlers.BadTimeoutOfResource'
ERRORS = [
    ZMQBacklogError('x'),
    ZMQClosedError('x'),
    ZMQMessageError(413, 'x'),
    ZMQRefusedError('x'),
    *[
        ZMQRemoteError(status, 'x')
        for status in (400, 401, 403, 404, 413, 500, 502, 503, 504, 507, 418)
    ],
    *[ZMQJobError(status, 'x') for status in (400, 403, 404, 409, 501)],
    ZMQReplyError('x'),
    ZMQStartError('x'),
    ZMQTimeoutError('x'),
    ZMQUnreachableError('x'),
]


class Slow:
    """Takes its time, or fails."""

    def nap(self, seconds):
        time.sleep(seconds)  # as long as the test asks, for clients that wait less
        return [200, seconds]

    def fail(self, args):
        raise ValueError(SECRET)


@pytest.fixture
def connect(config, tmp_path):
    """Declare a service; return a client for a request, and a function that runs its process."""

    def declare(handler=Slow, **options):
        options.setdefault('address', f'ipc://{tmp_path}/zmq')
        options.setdefault('start', 'external')
        config.include('pyams_zmq')
        config.add_zmq_process('worker', handler=handler, **options)
        config.commit()
        request = Request.blank('/')
        request.registry = config.registry
        apply_request_extensions(request)
        process = services_of(config.registry)['worker'].make_process(config.registry)
        return request.zmq('worker'), process

    yield declare
    config.registry.zmq_clients.close()


@pytest.fixture
def raises():
    """Call a function, and check the text of its error, which can be pickled."""

    def check(cls, text, step, function, *args, **kwargs):
        with pytest.raises(cls) as raised:
            function(*args, **kwargs)
        error = raised.value
        pattern = (
            rf"{text}.*\. Service 'worker' at [a-z]+://\S+ is started by "
            rf'"pyams_zmq serve INI worker" \(start = external\): {step}'
        )
        assert re.match(pattern, str(error), re.DOTALL), str(error)
        assert SECRET not in str(error)
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.args) == (type(error), str(error), error.args)
        assert vars(copy) == vars(error)
        return error

    return check


# Texts


@pytest.mark.parametrize('error', ERRORS, ids=str)
@pytest.mark.parametrize('start', ['auto', 'external', 'never'])
def test_each_error_has_a_step(error, start):
    service = SimpleNamespace(name='worker', client_address='tcp://h:1', start=start)
    text = advise(service, error)
    assert text.startswith("Service 'worker' at tcp://h:1 ")
    assert f'(start = {start}): ' in text
    assert '{' not in text
    assert len(text.partition('): ')[2]) > 20


REPLIES = [
    (400, 'Bad message, expected [type, args]: x', 'compare the message with the parameters'),
    (
        400,
        "Bad arguments of 'book': x; it takes book(a)",
        'compare the message with the parameters',
    ),
    (400, "'book' does not take a message of 2 frames", 'compare the message with the parameters'),
    (401, 'Your access was withdrawn', 'auth of the service has lost the user of this client'),
    (403, "User 'a' at h may not read the statistics: x", 'let the service allow it'),
    (404, "Unknown message type 'book'", 'compare the message with the public methods'),
    (413, 'Message is 9 bytes; the limit is 8', 'send less, or raise pyams_zmq.worker.max_message'),
    (500, 'Internal error, see the log of the service under id 1', 'see the log of the service'),
    (500, 'The reply is 9 bytes; the limit is 8 (max_reply_size)', 'return less, or raise pyams_'),
    (502, 'The worker ended with SIGKILL during this call', 'see the log of the service; a method'),
    (503, 'The service is stopping, try again later', 'try again later'),
    (503, 'The service is overloaded: 9 calls wait, try again later', 'try again later; if that'),
    (504, "'book' has not ended after 1 s", 'raise the timeout of the method'),
    (504, 'The deadline of the message has passed', 'raise the timeout of the method'),
    (410, 'The job 018f was cancelled', 'somebody has cancelled the job'),
    (504, 'The job 018f has expired before it began', 'raise expires of the job'),
    (
        507,
        'The journal cannot be written: its jobs take 9 bytes',
        'raise pyams_zmq.worker.journal_',
    ),
    (507, 'The journal cannot be written: disk full; try again later', 'make room on the disk'),
    (
        413,
        'The result of the job has 9 bytes; the limit is 8: x',
        'let the method store its result',
    ),
    (500, 'The result of a job cannot have binary frames: x', 'let the method store its result'),
    (502, 'The worker died during this job, as others did before', 'see the log .* retry the job'),
    (503, 'The service is overloaded: 9 messages wait for jobs', '.* watch several jobs at once'),
    (503, 'The disk of the journal is too slow, try again later', '.* a faster disk'),
    (504, "The job 'book' has not ended after 1 s", 'raise the timeout of submit, or'),
    (409, 'The job 018f is running and has no result', 'wait for its end'),
    (400, 'Bad option delay: write a number', 'correct what the text names'),
]
JOB_REPLIES = [
    (400, 'Bad option limit: write an integer from 1 to 100', 'correct what the text names'),
    (403, "User 'a' at h may not read the statistics: x", 'ask on the machine of the service'),
    (404, 'Unknown job id', 'compare the id; .* pyams_zmq.worker.keep'),
    (404, 'Unknown job id in "before"', 'ask for the first page again'),
    (409, 'The job has ended, it is done', 'ask for its state'),
    (409, 'Another job with its key has not ended', 'wait for the end of the other one'),
    (500, 'The journal cannot be read: x', 'see the log of the service, and check the disk'),
    (501, 'The service keeps no jobs: it has no journal', 'set pyams_zmq.worker.journal'),
    (503, 'The service is stopping, try again later', 'try again later'),
]
SERVICE = SimpleNamespace(name='worker', client_address='tcp://h:1', start='never')


@pytest.mark.parametrize(('status', 'text', 'step'), REPLIES)
def test_step_of_a_reply_of_the_service(status, text, step):
    assert re.search(rf'\): {step}', advise(SERVICE, ZMQRemoteError(status, text)))


@pytest.mark.parametrize(('status', 'text', 'step'), JOB_REPLIES)
def test_step_of_a_reply_about_a_job(status, text, step):
    assert re.search(rf'\): {step}', advise(SERVICE, ZMQJobError(status, text)))


@pytest.mark.parametrize('status', sorted({*(status for status, _text, _step in REPLIES)}))
def test_step_of_a_reply_of_a_method(status):
    """The methods of the service do not lack a `book`, for instance: one of them says 404."""
    text = advise(SERVICE, ZMQRemoteError(status, 'No book 7'))
    assert text.endswith('): its method has chosen this status')


@pytest.mark.parametrize('text', ['No book 7.', 'Which book?', 'Go away!'])
def test_advice_after_a_sentence(text):
    error = ZMQRemoteError(404, text)
    error.advice = 'Do this'
    assert str(error) == f'404 {text} Do this'


def test_command_names_the_file():
    service = SimpleNamespace(name='worker', client_address='tcp://h:1', start='external')
    text = advise(service, ZMQUnreachableError('x'), ini='/srv/my app.ini#two')
    assert '"pyams_zmq serve \'/srv/my app.ini#two\' worker"' in text


def test_service_that_hangs():
    """It is there: another one could not be started beside it."""
    service = SimpleNamespace(name='worker', client_address='tcp://h:1', start='external')
    error = ZMQUnreachableError('x')
    error.is_accepted = True
    assert advise(service, error).endswith('): see its log; stop it if it hangs, then run that')


@pytest.mark.parametrize('start', ['auto', 'external', 'never'])
def test_reason_is_the_step(start):
    service = SimpleNamespace(name='worker', client_address='tcp://h:1', start=start)
    text = advise(service, ZMQUnreachableError('x'), problem='no tool ffmpeg')
    assert text.endswith('): it cannot start: no tool ffmpeg')
    assert 'ffmpeg' not in advise(service, ZMQTimeoutError('x'), problem='no tool ffmpeg')


def test_error_without_a_service():
    error = ZMQRemoteError(404, 'x')
    assert str(error) == '404 x'
    error.advice = 'Do this'
    assert str(error) == '404 x. Do this'
    assert (error.status, error.payload, error.text) == (404, 'x', 'x')


def test_client_without_a_registry(connect, config):
    """A client that `make_client` returns gives advice, too."""
    connect()
    with services_of(config.registry)['worker'].make_client() as client:
        client.connect_timeout = 0.01
        with pytest.raises(ZMQUnreachableError, match="Service 'worker' at ipc:"):
            client.call('nap', 0)


# Real errors


def test_service_that_is_down(connect, raises):
    with reserved_port() as port:
        client, _process = connect(address=f'127.0.0.1:{port}')
        start = time.monotonic()
        step = 'run that, or see its log'
        raises(ZMQUnreachableError, 'No service has answered', step, client.call, 'nap', 1)
        assert time.monotonic() - start < 3
        raises(ZMQUnreachableError, 'No service has answered', step, client.send, 'nap', 1)


def test_replies(connect, raises):
    client, process = connect()
    with running(process):
        error = raises(
            ZMQRemoteError,
            "404 Unknown message type 'nope'",
            'compare the message with the public methods of the handler',
            client.call,
            'nope',
        )
        assert (error.status, error.payload) == (404, "Unknown message type 'nope'")
        raises(ZMQRemoteError, '500 Internal error', 'see the log', client.call, 'fail')
        raises(ZMQTimeoutError, '.* has not replied', 'the m', client.call, 'nap', 1, timeout=0.1)


def test_too_large(connect, raises):
    client, process = connect(max_message_size=1024)
    client._client.max_message_size = 2048
    with running(process):
        raises(ZMQRemoteError, '413 ', 'send less, or raise', client.call, 'nap', 'x' * 1024)
        for function in (client.call, client.send):
            text = 'send less, or raise pyams_zmq.worker.max_message_size'
            raises(ZMQMessageError, '413 Message is', text, function, 'nap', 'x' * 4096)


def test_refused(connect, raises):
    client, process = connect(auth=f'webapp:{SECRET}', client_auth=f'webapp:{SECRET}2')
    with running(process):
        raises(ZMQRefusedError, '.*Connection refused', 'compare', client.call, 'nap', 0)


def test_file_of_the_user_is_missing(connect, raises, tmp_path):
    """The service keeps its users, so the client can be made when the file is there again."""
    users = tmp_path / 'users'
    users.write_text(f'webapp:{SECRET}')
    client, process = connect(auth_file=users)
    request = client._request
    request.registry.zmq_clients.close()
    with running(process):
        users.rename(tmp_path / 'moved')
        text = (
            "A client of 'worker' cannot be made: Credentials file '.*/users': No such file or dir"
        )
        raises(ZMQRefusedError, text, 'compare', request.zmq, 'worker')
        (tmp_path / 'moved').rename(users)
        assert request.zmq('worker').call('nap', 0) == 0


def test_closed(connect, raises):
    client, _process = connect()
    client._client.close()
    for function in (client.call, client.request, client.send):
        raises(ZMQClosedError, 'The client of', 'get a new client', function, 'nap')
    raises(ZMQClosedError, 'The client', 'get a', client._client.prepare)
    raises(ZMQClosedError, 'The client', 'get a', client._client.post, 'nap', b'["nap",0]')


def test_backlog(connect, raises):
    client, process = connect(timeout=0.1)
    client._client.max_backlog = 1
    with running(process):
        client.send('nap', 0.5)
        raises(ZMQBacklogError, '.* takes no message now', 'try again', client.send, 'nap', 0)


def test_another_program(connect, raises, tmp_path):
    """What listens there is not a service of this package."""
    client, _process = connect()
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.linger = 0
        socket.bind(f'ipc://{tmp_path}/zmq')
        thread = threading.Thread(target=lambda: (socket.recv(), socket.send(b'hello')))
        thread.start()
        raises(ZMQReplyError, 'The reply is not JSON', 'check that', client.call, 'nap', 0)
        thread.join()


def test_commit(connect, raises):
    """A transaction says the same: before its commit, and in its vote."""
    client, process = connect()
    manager = client._request.tm = transaction.TransactionManager()
    step = 'run that, or see its log'
    manager.begin()
    client.send('nap', 0)
    raises(ZMQUnreachableError, 'No service has answered', step, manager.commit)
    manager.abort()
    with running(process):
        manager.begin()
        manager.get().join(Journal(commit=process.stop))
        client.send('nap', 0)
        raises(ZMQUnreachableError, 'No service has answered', step, manager.commit)
    manager.abort()


# From the declaration to the error


def answer_of(server):
    """Return the text of the error that a view gets."""
    status, text = wait_until(server.get, TIMEOUT)['reply']
    assert status == 503
    return text


def test_handler_that_cannot_be_made(run_program, tmp_path):
    """The application serves; it starts the service once, and says why it is not there."""
    server = run_program(
        factory=WebServer.pserve,
        application='declared',
        address=f'ipc://{tmp_path}/zmq',
        **{'pyams_zmq.worker.handler': WRONG},
    )
    wait_until(lambda: 'is not started again' in server.log.read_text(), TIMEOUT)
    text = answer_of(server)
    assert f'The handler {WRONG} cannot be made: Bad timeout -1' in text
    assert 'is started by the application when it serves requests (start = auto)' in text
    log = server.log.read_text()
    assert log.count('is not started again') == 1
    assert 'is started again in' not in log


def test_command_that_cannot_start(run_program, tmp_path):
    """Its exit code is 1, and clients of the application say why, and how to start it again."""
    settings = {'pyams_zmq.worker.handler': WRONG, 'pyams_zmq.worker.start': 'external'}
    ini = WebServer.configure(tmp_path, 'declared', settings)
    address = f'address=ipc://{tmp_path}/zmq'
    options = ('-W', 'ignore:pkg_resources is deprecated', '-m', 'pyams_zmq', 'serve')
    command = run_program(*options, str(ini), 'worker', address)
    assert command.wait(TIMEOUT) == 1
    server = run_program('-m', 'pyramid.scripts.pserve', str(ini), address, factory=WebServer)
    text = answer_of(server)
    assert f'"pyams_zmq serve {shlex.quote(str(ini))} worker" (start = external)' in text
    assert f'it cannot start: The handler {WRONG} cannot be made' in text
