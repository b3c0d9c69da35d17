# SPDX-License-Identifier: ZPL-2.1
"""Binary frames: what is accepted, what is refused, and replies that contain them."""

import array
import copy
import pickle
from itertools import repeat

import pytest
import zmq

from pyams_zmq.exceptions import ZMQMessageError, ZMQRemoteError, ZMQReplyError
from pyams_zmq.message import MAX_FRAMES, Multipart, payload_of
from pyams_zmq.wire.body import decode_body, encode_reply, measure_body, size_of
from pyams_zmq.wire.message import check_size, encode_message
from pyams_zmq.wire.multipart import to_frames


@pytest.mark.parametrize(
    'frame',
    [
        b'data',
        bytearray(b'data'),
        memoryview(b'data'),
        memoryview(b'd.a.t.a.')[::2],
        zmq.Frame(b'data'),
        array.array('B', b'data'),
        type('Bytes', (bytes,), {})(b'data'),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_each_kind_of_buffer(frame):
    [result] = to_frames([frame])
    assert type(result) is bytes
    assert result == b'data'


def test_items_of_a_buffer_may_have_several_bytes():
    assert to_frames([array.array('I', [1, 2])]) == [b'\1\0\0\0\2\0\0\0']


def test_each_kind_of_iterable():
    assert to_frames(None) == []
    for frames in ([b'a', b''], (b'a', b''), iter([b'a', b'']), {b'a': 1, b'': 2}):
        assert to_frames(frames) == [b'a', b'']


def test_buffers_are_copied_and_bytes_are_not():
    data, buffer = b'x' * 100, bytearray(b'before')
    frames = to_frames([data, buffer])
    buffer[:] = b'after!'
    assert frames == [data, b'before']
    assert frames[0] is data


@pytest.mark.parametrize(
    ('frames', 'text'),
    [
        (b'secret', r'Bad frames \(bytes\): write a list of them, \[frame\]'),
        (bytearray(b'secret'), r'Bad frames \(bytearray\): write a list of them'),
        (zmq.Frame(b'secret'), r'Bad frames \(Frame\): write a list of them'),
        ('secret', r'Bad frames \(str\): write a list of them'),
        (17, r'Bad frames \(int\): write a list of bytes'),
        (['secret'], r'Bad frame 0 \(str\): write bytes; encode the text'),
        ([b'', 17], r'Bad frame 1 \(int\): write bytes'),
        ([b'', None], r'Bad frame 1 \(NoneType\): write bytes'),
        ([[b'secret']], r'Bad frame 0 \(list\): write bytes'),
    ],
)
def test_what_is_not_a_list_of_buffers(frames, text):
    with pytest.raises(TypeError, match=text) as error:
        to_frames(frames)
    assert 'secret' not in str(error.value)
    with pytest.raises(TypeError, match=text):
        Multipart(None, frames)


def test_number_of_frames():
    assert len(to_frames([b''] * MAX_FRAMES)) == MAX_FRAMES
    with pytest.raises(ValueError, match=f'there are more than {MAX_FRAMES}'):
        to_frames(repeat(b''))  # without an end


def test_multipart():
    reply = Multipart([200, 'x'], (b'secret', bytearray(3)))
    value, frames = reply
    assert (value, frames) == ([200, 'x'], [b'secret', bytes(3)])
    assert repr(reply) == "Multipart([200, 'x'], [<6 bytes>, <3 bytes>])"
    assert reply == Multipart([200, 'x'], [b'secret', bytes(3)])
    assert reply != Multipart([200, 'x'])
    assert reply != ([200, 'x'], [b'secret', bytes(3)])
    for duplicate in (copy.copy(reply), copy.deepcopy(reply), pickle.loads(pickle.dumps(reply))):
        assert duplicate == reply
    with pytest.raises(AttributeError, match='make another one'):
        reply.value = 1
    with pytest.raises(TypeError, match='unhashable'):
        hash(reply)


def test_payload_of():
    assert payload_of(Multipart([201, 'x'], [b'y'])) == Multipart('x', [b'y'])
    with pytest.raises(ZMQRemoteError, match='404 x'):
        payload_of(Multipart([404, 'x'], [b'y']))


def test_replies():
    encoded = encode_reply(Multipart([200, 1], [b'x', b'yz']))
    assert encoded == [b'x', b'yz', b'[200,1]']
    assert decode_body(encoded) == Multipart([200, 1], [b'x', b'yz'])
    assert encode_reply(Multipart([200, 1])) == [b'[200,1]']
    assert decode_body([b'[200,1]']) == [200, 1]
    assert size_of(encoded) == 10
    assert size_of(b'[200,1]') == 7


def test_frame_that_was_added_later():
    reply = Multipart([200, 1])
    reply.frames.append('text')
    with pytest.raises(TypeError, match=r'Bad frame 0 \(str\)'):
        encode_reply(reply)


def test_bad_replies():
    with pytest.raises(ZMQReplyError, match='not JSON'):
        decode_body([b'[200,1]', b'x'])
    with pytest.raises(ZMQReplyError, match=f'1001 binary frames; the limit is {MAX_FRAMES}'):
        decode_body([b''] * 1001 + [b'[200,1]'])


def test_sizes():
    assert measure_body([b'x', memoryview(b'yz'), zmq.Frame(b'abc')]) == 6
    with pytest.raises(ZMQMessageError, match='400 Bad message of 1002 frames; the limit is 1001'):
        measure_body([b''] * 1002)
    check_size(b'12', 10, [b'12345', b'678'])
    with pytest.raises(ZMQMessageError, match='413 Message is 11 bytes; the limit is 10'):
        check_size(b'12', 10, [b'12345', b'6789'])
    with pytest.raises(ZMQMessageError, match='413 Message is 13 bytes; the limit is 12'):
        encode_message('a', 1, 12, [b'123456'])
