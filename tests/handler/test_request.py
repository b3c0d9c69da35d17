# SPDX-License-Identifier: ZPL-2.1
"""A method that takes a request gets one; its transaction is committed or aborted."""

import asyncio

import pytest
from pyramid.config import Configurator
from pyramid.threadlocal import get_current_registry, get_current_request
from pyramid_tm import is_tm_active

from handlers import Handler, Journal, MessageHandler
from pyams_zmq.client.transaction import is_under_way
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler.request import call_with_request


class Order:
    """A result that needs the transaction, as an object of a database does."""

    count = 0

    def __json__(self, request):
        Order.count += 1
        return [is_tm_active(request), request is get_current_request(), Order.count]


class RequestHandler(Handler):
    """Methods that take a request."""

    def about(self, args, *, request):
        return [
            200,
            [
                request is get_current_request(),
                request.registry is self.process.registry is get_current_registry(),
                request.root,
                request.hello,
            ],
        ]

    async def async_about(self, args, *, request, peer):
        await asyncio.sleep(0.01)
        assert peer.user == 'anonymous'
        return self.about(args, request=request)

    def order(self, *, request):
        return [200, Order()]

    async def async_order(self, *, request):
        return [200, Order()]

    def no_request(self, args):
        return [200, get_current_request() is None]

    def work(self, args, *, request):
        path, how = args
        request.tm.get().join(Journal(request.tm, path, how == 'fails in the vote'))
        return {
            'returns 200': lambda: [200, 'done'],
            'returns None': lambda: None,
            'returns 399': lambda: [399, 'done'],
            'returns 400': lambda: [400, 'not done'],
            'returns 600': lambda: [600, 'not a status'],
            'returns an object': object,
            'fails in the vote': lambda: [200, 'done'],
            'raises': self._raise,
            'refuses': self._refuse,
        }[how]()

    def _raise(self):
        raise ValueError('the secret of the handler')

    def _refuse(self):
        raise ZMQMessageError(409, 'conflict')

    async def async_work(self, args, *, request):
        await asyncio.sleep(0)
        return self.work(args, request=request)


class RequestMessageHandler(MessageHandler):
    """Serves RequestHandler."""

    handler = RequestHandler


@pytest.fixture
def registry():
    """Registry of an application with transactions."""
    config = Configurator(root_factory=lambda request: 'the root')
    config.add_request_method(lambda request: 'hello', 'hello', reify=True)
    config.include('pyramid_tm')
    config.commit()
    return config.registry


@pytest.fixture
def process(start, registry):
    """Process of this application."""
    return start(handler=RequestMessageHandler, registry=registry)


@pytest.mark.parametrize('kind', ['about', 'async_about'])
def test_request(process, ask, kind):
    for _ in range(2):
        assert ask(process, [kind, None]) == [200, [True, True, 'the root', 'hello']]
        assert ask(process, ['no_request', None]) == [200, True]


@pytest.mark.parametrize('kind', ['work', 'async_work'])
@pytest.mark.parametrize(
    ('how', 'status', 'journal'),
    [
        ('returns 200', 200, ['commit']),
        ('returns 399', 399, ['commit']),
        ('returns None', None, ['commit']),
        ('returns 400', 400, ['abort']),
        ('returns 600', 600, ['commit']),
        ('returns an object', 500, ['abort']),
        ('raises', 500, ['abort']),
        ('refuses', 409, ['abort']),
        ('fails in the vote', 500, ['abort', 'tpc_abort', 'abort']),
    ],
)
def test_transaction(process, ask, tmp_path, kind, how, status, journal):
    path = tmp_path / 'journal'
    for number in (1, 2):
        reply = ask(process, [kind, [str(path), how]])
        assert (reply and reply[0]) == status
        assert path.read_text().splitlines() == journal * number


@pytest.mark.parametrize('kind', ['order', 'async_order'])
def test_result_is_encoded_once_in_the_transaction(process, ask, kind):
    for number in (1, 2):
        assert ask(process, [kind, None]) == [200, [True, True, number]]


def test_wrong_frames_make_no_request(process, ask):
    assert ask(process, ['work', None])[0] == 500  # None cannot be unpacked
    assert ask(process, ['work'])[0] == 400
    assert ask(process, ['no_request', None]) == [200, True]


@pytest.mark.filterwarnings('ignore:coroutine .* was never awaited:RuntimeWarning')
def test_task_that_is_cancelled_before_it_began(registry, tmp_path):
    path = tmp_path / 'journal'

    def method(*, request):
        request.tm.get().join(Journal(request.tm, path))
        return asyncio.sleep(0)

    awaitable = call_with_request(registry, method)
    assert get_current_request() is not None
    awaitable.close()
    del awaitable
    assert get_current_request() is None
    assert path.read_text() == 'abort\n'


@pytest.mark.parametrize('hook', [None, 'pyramid_tm.explicit_manager'])
def test_root_factory_is_in_the_transaction(start, ask, hook):
    def make_root(request):
        assert is_tm_active(request)
        return is_under_way(request.tm)

    config = Configurator(
        root_factory=make_root, settings={'tm.manager_hook': hook} if hook else {}
    )
    config.add_request_method(lambda request: 'hello', 'hello', reify=True)
    config.include('pyramid_tm')
    config.commit()
    process = start(handler=RequestMessageHandler, registry=config.registry)
    for _ in range(2):
        assert ask(process, ['about', None]) == [200, [True, True, True, 'hello']]


def test_root_factory_fails(start, ask):
    def make_root(request):
        if not missing:
            missing.append(request)
            raise KeyError('no root')
        return len(missing)

    missing = []
    config = Configurator(root_factory=make_root)
    config.add_request_method(lambda request: 'hello', 'hello', reify=True)
    config.include('pyramid_tm')
    config.commit()
    process = start(handler=RequestMessageHandler, registry=config.registry)
    assert ask(process, ['about', None])[0] == 500
    assert ask(process, ['no_request', None]) == [200, True]
    assert ask(process, ['about', None]) == [200, [True, True, 1, 'hello']]


def test_finished_callbacks(start, ask, tmp_path):
    path = tmp_path / 'finished'
    config = Configurator(root_factory=lambda request: None)

    def hello(request):
        request.add_finished_callback(lambda request: path.touch())
        return 'hello'

    config.add_request_method(hello, 'hello', reify=True)
    config.commit()
    process = start(handler=RequestMessageHandler, registry=config.registry)
    assert ask(process, ['about', None])[0] == 200
    assert path.exists()


def test_without_transactions(start, ask):
    config = Configurator(root_factory=lambda request: None)
    config.add_request_method(lambda request: 'hello', 'hello', reify=True)
    config.commit()
    process = start(handler=RequestMessageHandler, registry=config.registry)
    status, about = ask(process, ['about', None])
    assert (status, about[:2], about[3]) == (200, [True, True], 'hello')
    assert ask(process, ['work', ['x', 'returns 200']])[0] == 500  # the request has no tm
