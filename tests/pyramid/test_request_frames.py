# SPDX-License-Identifier: ZPL-2.1
"""Binary frames of `request.zmq(name)`, and of the doubles for tests."""

import copy
import pickle

import pytest
import transaction
from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response

from frame_handlers import FrameMessageHandler
from pyams_zmq.exceptions import ZMQRemoteError
from pyams_zmq.message import Multipart
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import RecordingClient, Sent
from pyams_zmq.transaction import send_on_commit

HANDLER = 'frame_handlers.FrameMessageHandler'


@pytest.fixture(params=['process', 'pool', 'class'])
def handler(request):
    """Handler of a double, in each form."""
    return {
        'class': FrameMessageHandler,
        'process': ZMQProcess('127.0.0.1', FrameMessageHandler),
        'pool': ZMQPool('127.0.0.1', FrameMessageHandler),
    }[request.param]


def test_double_with_a_handler(handler):
    client = RecordingClient(handler=handler)
    for name in ('crop', 'async_crop', 'thread_crop', 'future_crop', 'request_crop'):
        assert client.call(name, 2, frames=[b'picture']) == Multipart(7, [b'pi'])
    with pytest.raises(ZMQRemoteError, match='400'):
        client.call('crop', 2)
    client.send('note_frames', 1, frames=[b'x'])
    assert client.call('all_notes') == [['x', 1]]


def test_double_logs_a_bad_status(caplog):
    client = RecordingClient(replies={'crop': Multipart([500, 'x'], [b'x'])})
    send_on_commit(client, 'crop', 1, frames=[b'x'])
    transaction.commit()
    assert 'the reply has status 500' in caplog.text


def test_sent():
    plain, framed = Sent('a', 'b', 1), Sent('a', 'b', 1, frames=[b'secret'])
    assert plain == ('a', 'b', 1)
    assert [plain] == [('a', 'b', 1)]
    assert framed == Sent('a', 'b', 1, [bytearray(b'secret')])
    assert framed != Sent('a', 'b', 1, [b'other'])
    assert framed != plain
    assert framed != ('a', 'b', 1)
    assert [framed] != [('a', 'b', 1)]
    assert len({plain, Sent('a', 'b', 1)}) == 1
    for sent in (plain, framed):
        for duplicate in (copy.copy(sent), pickle.loads(pickle.dumps(sent))):
            assert duplicate == sent
    assert repr(plain) == "Sent(name='a', type='b', args=1)"
    assert repr(framed) == "Sent(name='a', type='b', args=1, frames=[<6 bytes>])"
    name, kind, args = framed
    assert (name, kind, args) == ('a', 'b', 1)


def view(request):
    """Send one picture now, and another one on commit."""
    service = request.zmq('pictures')
    service.send('note_frames', 1, frames=[b'later'])
    size, [picture] = service.call('crop', 2, frames=[request.body])
    return Response(picture, headers={'X-Size': str(size)})


@pytest.fixture(params=['with pyramid_tm', 'without'])
def app(request):
    """Application of the view, whose messages are recorded and answered by the handler."""
    config = Configurator()
    if request.param == 'with pyramid_tm':
        config.include('pyramid_tm')
    config.include('pyams_zmq.testing')
    config.add_zmq_process('pictures', handler=HANDLER, address='127.0.0.1:1')
    config.add_route('home', '/')
    config.add_view(view, route_name='home')
    config.commit()
    config.registry.zmq_testing.eager = True
    return config.make_wsgi_app()


def test_request(app):
    response = Request.blank('/', method='POST', body=b'picture').get_response(app)
    assert (response.body, response.headers['X-Size']) == (b'pi', '7')
    outbox = app.registry.zmq_testing.outbox
    assert sorted(outbox) == [
        Sent('pictures', 'crop', 2, [b'picture']),
        Sent('pictures', 'note_frames', 1, [b'later']),
    ]
