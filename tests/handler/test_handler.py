# SPDX-License-Identifier: ZPL-2.1
"""Message handlers without a socket: the methods they call, and their replies."""

import abc
import asyncio
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partialmethod, singledispatchmethod
from types import SimpleNamespace

import pytest
from zope.interface.verify import verifyClass, verifyObject

from handlers import BrokenLog, Handler, MessageHandler, Unprintable
from messages import FAILURES
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.interfaces import IZMQMessageHandler
from pyams_zmq.message import decode_reply, encode

ERROR = re.compile('Internal error, see the log of the service under id ([0-9a-f]{12})')


class Stream:
    """Records the replies."""

    def __init__(self):
        self.replies = []

    def send(self, reply):
        self.replies.append(decode_reply(reply))


class ClosedStream:
    """Sends nothing."""

    def send(self, reply):
        raise OSError('Stream is closed')


def handle(frames, handler=Handler, stream=None, json_load=-1, **process):
    """Handle one message, and return the replies."""

    async def run():
        tasks = set()
        subject = ZMQMessageHandler(
            SimpleNamespace(owed_replies=tasks, **process),
            stream,
            print,
            handler=handler,
            json_load=json_load,
        )
        subject(list(frames))
        while tasks:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)

    stream = Stream() if stream is None else stream
    asyncio.run(run())
    return getattr(stream, 'replies', None)


def ask(name, args=None, **kwargs):
    """Handle one message of one frame, and return the reply."""
    (reply,) = handle([encode([name, args])], **kwargs)
    return reply


def test_interface():
    verifyClass(IZMQMessageHandler, ZMQMessageHandler)
    verifyObject(IZMQMessageHandler, ZMQMessageHandler(None, None, print, handler=Handler))


def test_no_handler():
    with pytest.raises(TypeError, match=r'^ZMQMessageHandler has no handler: set its class attr'):
        ZMQMessageHandler(None, None, print)


def test_attributes():
    process, stream = object(), object()
    handler = MessageHandler(process, stream, print)
    assert isinstance(handler.rep_handler, Handler)
    assert handler.rep_handler.process is handler.process is process
    assert handler.rep_stream is stream
    assert handler.json_load == -1


def test_handler_is_an_instance():
    instance = Handler()
    handler = MessageHandler(None, None, print, handler=instance)
    assert handler.rep_handler is instance
    assert ask('echo', 1, handler=instance) == [200, 1]


def test_false_handler_is_a_handler():
    class Empty(list):
        def echo(self, args):
            return args

    assert ask('echo', 1, handler=Empty()) == 1


class Kinds:
    """All kinds of methods."""

    def plain(self, args):
        return args

    def optional(self, args=None, more=None):
        return [args, more]

    def positional(self, args, /):
        return args

    def keyword(self, args, *, flag=True):
        return [args, flag]

    def keywords(self, args, **kwargs):
        return [args, kwargs]

    @staticmethod
    def static(args):
        return args

    @classmethod
    def klass(cls, args):
        return [cls.__name__, args]

    @singledispatchmethod
    def single(self, args):
        return ['any', args]

    @single.register
    def _(self, args: int):
        return ['int', args]

    part = partialmethod(optional, 'part')
    wrapped = abc.abstractmethod(plain)
    builtin = staticmethod(max)
    function = len
    loose = print
    __public = plain


@pytest.mark.parametrize(
    ('name', 'args', 'reply'),
    [
        ('plain', 1, 1),
        ('optional', 1, [1, None]),
        ('positional', 1, 1),
        ('keyword', 1, [1, True]),
        ('keywords', 1, [1, {}]),
        ('static', 1, 1),
        ('klass', 1, ['Kinds', 1]),
        ('single', 1, ['int', 1]),
        ('single', 'x', ['any', 'x']),
        ('part', 1, ['part', 1]),
        ('wrapped', 1, 1),
        ('builtin', [1, 3, 2], 3),
        ('function', 'four', 4),
    ],
)
def test_kinds_of_methods(name, args, reply):
    assert ask(name, args, handler=Kinds) == reply


class Meta(type):
    """Messages cannot call its methods."""

    def of_the_metaclass(cls, args=None):
        return args


class Names(Handler, metaclass=Meta):
    """Names that are not message types."""

    alias = list
    _alias = Handler.echo
    none = None
    echo = None


@pytest.mark.parametrize(
    'name',
    [
        'unknown',
        '',
        ' ',
        '\0',
        'é',
        '_private',
        '_alias',
        '__class__',
        '__init__',
        '__call__',
        'echo.__call__',
        'process',
        'secret',
        'value',
        'Nested',
        'hook',
        'alias',
        'none',
        'echo',
        'mro',
        'of_the_metaclass',
        'x' * 1_000_000,
    ],
    ids=lambda name: repr(name[:20]),
)
def test_no_message_type(name):
    assert ask(name, handler=Names) == [404, f'Unknown message type {name[:80]!r}']


def test_method_of_an_instance_that_is_no_longer_callable():
    handler = Handler()
    handler.echo = None
    assert ask('echo', handler=handler) == [404, "Unknown message type 'echo'"]


@pytest.mark.parametrize(
    ('name', 'frames', 'json_load', 'reply'),
    [
        ('echo', [None], -1, [200, 1]),
        ('echo', [None], 0, [200, 1]),
        ('echo', [None], 1, [400, 'Bad message of 1 frames']),
        ('echo', [None], -2, [400, 'Bad message of 1 frames']),
        ('echo', [b'x', None], -1, [400, "'echo' does not take a message of 2 frames"]),
        ('no_args', [b'x', None], -1, [400, "'no_args' does not take a message of 2 frames"]),
        ('first', [b'x', None], -1, [200, ['x', 1]]),
        ('first', [b'x', b'y', None], -1, [400, "'first' does not take a message of 3 frames"]),
        ('many', [b'x'] * 998 + [None, b'x'], -2, [200, 1000]),
    ],
)
def test_frames(name, frames, json_load, reply):
    message = encode([name, 1])
    frames = [message if frame is None else frame for frame in frames]
    assert handle(frames, json_load=json_load) == [reply]


def test_no_frames():
    assert handle([]) == [[400, 'Bad message of 0 frames']]


@pytest.mark.parametrize('frames', [[b'x' * 101], [b'x'] * 101, [b'x' * 100, b'x']])
def test_too_large(frames):
    assert handle(frames, max_message_size=100) == [[413, 'Message is 101 bytes; the limit is 100']]


def test_largest():
    message = encode(['echo', 'x' * 90])
    assert handle([message], max_message_size=len(message)) == [[200, 'x' * 90]]


def test_draining():
    assert ask('echo', draining=True) == [503, 'The service is stopping, try again later']


@pytest.mark.parametrize('name', FAILURES)
@pytest.mark.parametrize('method', ['raises', 'async_raises'])
def test_failing_method(method, name, caplog):
    status, text = ask(method, name)
    assert status == 500
    error_id = ERROR.fullmatch(text)[1]
    (record,) = caplog.records
    assert record.name == 'PyAMS (zmq)'
    assert record.getMessage() == f'Message handler failed, error id {error_id}'
    assert record.exc_info[0].__name__ == name
    assert f'in {method}' in caplog.text


class SecondLoopHandler(Handler):
    """Runs a coroutine to its end, in different ways."""

    def run(self, args):
        coroutine = self.async_echo(args)
        try:
            return asyncio.run(coroutine)
        finally:
            coroutine.close()

    def run_in_own_loop(self, args):
        loop = asyncio.new_event_loop()
        try:
            return self._run_in(loop, args)
        finally:
            loop.close()

    def run_in_running_loop(self, args):
        return self._run_in(asyncio.get_running_loop(), args)

    async def async_run(self, args):
        return self.run(args)

    def run_in_thread(self, args):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(self.run, args).result()

    def _run_in(self, loop, args):
        coroutine = self.async_echo(args)
        try:
            return loop.run_until_complete(coroutine)
        finally:
            coroutine.close()

    def no_loop(self, args):
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(asyncio.get_running_loop).result()


@pytest.mark.parametrize('method', ['run', 'run_in_own_loop', 'run_in_running_loop', 'async_run'])
def test_second_loop(method, caplog):
    """The log says what to do: a loop cannot run in the loop of the process."""
    status, _text = ask(method, 1, handler=SecondLoopHandler)
    assert status == 500
    [record] = caplog.records
    assert record.getMessage().endswith(
        ': the loop of the process is running, another one cannot start beside it; make the method '
        '`async def` and await, or let plain methods run in threads (`concurrency` above 1, or a '
        '`timeout` of the method)'
    )


def test_other_errors_with_loops(caplog):
    assert ask('run_in_thread', 1, handler=SecondLoopHandler) == [200, 1]
    assert ask('no_loop', 1, handler=SecondLoopHandler)[0] == 500
    assert ask('raises', 'ValueError', handler=SecondLoopHandler)[0] == 500
    assert len(caplog.records) == 2
    assert 'another one' not in caplog.text


@pytest.mark.parametrize(
    ('method', 'args'),
    [
        ('recurse', 1),
        ('async_recurse', 1),
        ('deep_result', 1),
        ('async_deep_result', 1),
        ('generates', 1),
        ('raises', 'no such name'),
        ('raises', 'bad ZMQMessageError'),
        ('async_raises', 'bad ZMQMessageError'),
    ],
)
def test_failing_otherwise(method, args, caplog):
    status, text = ask(method, args)
    assert status == 500
    assert ERROR.fullmatch(text)[1] in caplog.text


@pytest.mark.parametrize('method', ['raises', 'async_raises'])
def test_chosen_reply(method, caplog):
    assert ask(method, 'ZMQMessageError') == [418, 'I am a teapot']
    assert not caplog.records


@pytest.mark.parametrize('method', ['raises', 'async_raises'])
def test_unprintable_exception(method, monkeypatch, capfd):
    # As in a service: the handlers of pytest raise.
    monkeypatch.setattr(logging.getLogger(), 'handlers', [logging.StreamHandler()])
    status, text = ask(method, 'Unprintable')
    assert status == 500
    assert ERROR.fullmatch(text)[1] in capfd.readouterr().err


def test_unprintable_exception_of_a_strict_log(caplog, monkeypatch):
    messages = []

    def emit(record):
        if record.exc_info:
            raise Unprintable
        messages.append(record.getMessage())

    monkeypatch.setattr(logging.getLogger(), 'handlers', [SimpleNamespace(level=0, handle=emit)])
    status, text = ask('raises', 'ValueError')
    assert status == 500
    assert messages == [
        (
            f'Message handler failed, error id {ERROR.fullmatch(text)[1]}, '
            f'with an unprintable ValueError (Unprintable)'
        )
    ]


@pytest.mark.parametrize('method', ['raises', 'async_raises'])
def test_log_that_always_fails(method, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), 'handlers', [BrokenLog()])
    status, text = ask(method, 'ValueError')
    assert (status, bool(ERROR.fullmatch(text))) == (500, True)


@pytest.mark.parametrize(
    'name',
    ['object', 'surrogate', 'generator', 'tuple key', 'cycle'],
)
@pytest.mark.parametrize('method', ['returns', 'async_returns'])
def test_result_is_not_json(method, name, caplog):
    status, text = ask(method, name)
    assert status == 500
    assert ERROR.fullmatch(text)[1] in caplog.text


@pytest.mark.parametrize(
    ('name', 'reply'),
    [
        ('str subclass', 'text'),
        ('big', 2**70),
        ('tuple', [200, 'OK']),
        ('set', [1]),
        ('bytes', 'Ynl0ZXM='),
        ('nan', None),
        ('infinity', [1, {'x': None}]),
    ],
)
@pytest.mark.parametrize('method', ['returns', 'async_returns'])
def test_result_is_json(method, name, reply):
    assert ask(method, name) == reply


@pytest.mark.parametrize('method', ['nothing', 'async_nothing'])
def test_no_result(method):
    assert ask(method) is None


def test_task_and_future():
    class Later:
        def task(self, args):
            return asyncio.ensure_future(asyncio.sleep(0, args))

        def future(self, args):
            future = asyncio.get_running_loop().create_future()
            future.set_result(args)
            return future

        def cancelled(self, args):
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            return future

    assert ask('task', 1, handler=Later) == 1
    assert ask('future', 1, handler=Later) == 1
    assert ask('cancelled', 1, handler=Later)[0] == 500


@pytest.mark.filterwarnings('ignore:coroutine .* was never awaited:RuntimeWarning')
def test_cancelled_before_it_began():
    async def run():
        process, stream = SimpleNamespace(owed_replies=set()), Stream()
        MessageHandler(process, stream, print)([b'["async_echo",1]'])
        (task,) = asyncio.all_tasks() - {asyncio.current_task()}
        task.cancel()
        await asyncio.wait(process.owed_replies)
        await asyncio.sleep(0)  # one iteration of the loop runs the callback of the task
        assert not process.owed_replies
        return stream.replies

    ((status, _text),) = asyncio.run(run())
    assert status == 503


@pytest.mark.parametrize('method', ['echo', 'async_echo', 'raises', 'async_raises'])
def test_closed_stream(method, caplog):
    handle([encode([method, 'ValueError'])], stream=ClosedStream())
    record = caplog.records[-1]
    assert record.getMessage().endswith(' could not be sent')
    assert 'Stream is closed' in caplog.text


def test_process_without_attributes():
    stream = Stream()
    ZMQMessageHandler(object(), stream, print, handler=Handler)([b'["echo",1]'])
    assert stream.replies == [[200, 1]]


def test_method_is_inspected_once(monkeypatch):
    handler = MessageHandler(None, Stream(), print)
    handler([b'["echo",1]'])
    monkeypatch.setattr('pyams_zmq.handler.methods.signature', None)
    handler([b'["echo",2]'])
    assert handler.rep_stream.replies == [[200, 1], [200, 2]]


def test_refusals_are_logged_at_debug(caplog):
    caplog.set_level(logging.DEBUG, 'PyAMS (zmq)')
    ask('x' * 1000)
    (record,) = caplog.records
    assert record.getMessage().startswith('Message refused: 404 Unknown message type')
    assert len(record.getMessage()) < 200


def test_message_error():
    error = ZMQMessageError('418', 5)
    assert (error.status, error.text, str(error)) == (418, '5', '418 5')
