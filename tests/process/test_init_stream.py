# SPDX-License-Identifier: ZPL-2.1
"""Subclasses that override `init_stream`, as those of version 2.0.0 do."""

import pytest
import zmq

from handlers import Process
from pyams_zmq.process import ZMQProcess


class AsIn2(Process):
    """Sets the callback of the stream, which `setup` had bound in 2.0.0."""

    def init_stream(self):
        self.rep_stream.on_recv(self.handler(self, self.rep_stream, self.stop))


class Binding(Process):
    """Binds the stream itself."""

    def init_stream(self):
        self.rep_stream, _ = self.stream(self.socket_type, self.bind_addr, bind=True)
        self.rep_stream.on_recv(self.handler(self, self.rep_stream, self.stop))


class Local(Process):
    """Does not set `rep_stream`."""

    def init_stream(self):
        stream, _ = self.stream(self.socket_type, self.bind_addr, bind=True)
        stream.on_recv(self.handler(self, stream, self.stop))


class BindingFirst(Process):
    """Calls the method of the base class after its own work."""

    def init_stream(self):
        Binding.init_stream(self)
        super().init_stream()


class OtherFirst(Process):
    """Binds another stream before that of the messages."""

    def init_stream(self):
        self.other, _ = self.stream(zmq.PULL, '127.0.0.1', bind=True)
        super().init_stream()


class OtherFirstAsIn2(AsIn2):
    """Binds another stream before the one of the messages, which `init_stream` only reads."""

    def init_stream(self):
        self.other, _ = self.stream(zmq.PULL, '127.0.0.1', bind=True)
        super().init_stream()


class OtherLast(Process):
    """Binds another stream after that of the messages."""

    def init_stream(self):
        super().init_stream()
        self.other, _ = self.stream(zmq.SUB, '127.0.0.1', bind=True)


class InSetup(Process):
    """Sets the callback in `setup`, which had bound the stream in 2.0.0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rep_stream = None

    def init_stream(self):
        """Leave it to `setup`."""

    def setup(self):
        super().setup()
        AsIn2.init_stream(self)


class Later(Process):
    """Sets the callback when the loop runs."""

    def init_stream(self):
        self.loop.add_callback(AsIn2.init_stream, self)


class OwnAttribute(Process):
    """Declares the attribute again."""

    rep_stream = None


class OtherOnly(Process):
    """Binds another stream, and sets the callback in the loop."""

    def init_stream(self):
        self.other, _ = self.stream(zmq.PULL, '[::1]', bind=True)
        Later.init_stream(self)


@pytest.mark.parametrize(
    'cls',
    [
        *(AsIn2, Binding, Local, BindingFirst, OtherFirst, OtherFirstAsIn2, OtherLast, InSetup),
        *(Later, OwnAttribute, OtherOnly),
    ],
)
def test_messages_are_handled(cls, start, ask):
    """They are those to the address that the process reports."""
    process = start(factory=cls)
    assert ask(process, ['echo', 1]) == [200, 1]
    assert process.rep_stream is None  # in the parent
    process.stop()
    assert process.exitcode == 0


class Collector(ZMQProcess):
    """Binds only a stream of its own; its handler sends what it receives to another program."""

    def init_stream(self):
        self.collected, _ = self.stream(zmq.PULL, self.bind_addr, bind=True)
        self.collected.on_recv(self.forward)

    def _on_started(self):
        super()._on_started()
        self.answers, _ = self.stream(zmq.PUSH, self.handler, bind=False)

    def forward(self, frames):
        self.answers.send_multipart([*frames, repr(self.rep_stream).encode()])


def test_process_without_a_stream_of_messages():
    with (
        zmq.Context() as context,
        context.socket(zmq.PULL) as sink,
        context.socket(zmq.PUSH) as tap,
    ):
        tap.linger = 0
        port = sink.bind_to_random_port('tcp://127.0.0.1')
        process = Collector('127.0.0.1', f'127.0.0.1:{port}')
        process.start()
        try:
            tap.connect(process.wait_ready())
            tap.send(b'x')
            assert sink.poll(10_000)
            assert sink.recv_multipart() == [b'x', b'None']
        finally:
            process.stop()
        assert process.exitcode == 0
