# SPDX-License-Identifier: ZPL-2.1
"""The classes provide their interfaces, and subscribers get the events."""

import logging
import os
import threading
import time

import pytest
import zmq
from pyramid.registry import Registry
from pyramid.threadlocal import get_current_registry
from zope.interface import Interface
from zope.interface.interfaces import IObjectEvent
from zope.interface.verify import verifyClass, verifyObject

from checks import wait_until
from handlers import Handler, MessageHandler, Process
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.handler import ZMQMessageHandler
from pyams_zmq.interfaces import (
    IZMQMessageHandler,
    IZMQProcess,
    IZMQProcessEvent,
    IZMQProcessStartedEvent,
    IZMQProcessStoppedEvent,
    ZMQProcessStartedEvent,
    ZMQProcessStoppedEvent,
)
from pyams_zmq.process import ZMQProcess
from raw_peer import RawPeer, request

EVENTS = [
    (IZMQProcessStartedEvent, ZMQProcessStartedEvent),
    (IZMQProcessStoppedEvent, ZMQProcessStoppedEvent),
]


class Converter(Process):
    """Has an attribute of its own."""

    def __init__(self, tool, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tool = tool


class Journal:
    """Lines that subscribers write in a child, and the test reads."""

    def __init__(self, path):
        self.path = path

    def write(self, *words):
        with self.path.open('a', encoding='utf-8') as file:
            print(*words, file=file)

    def read(self):
        if not self.path.exists():
            return []
        return self.path.read_text(encoding='utf-8').splitlines()


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / 'journal')


@pytest.fixture
def registry(journal):
    """A registry whose subscribers write the events to the journal."""
    registry = Registry('tests')
    registry.settings = {'converter.tool': 'ffmpeg'}

    def subscribe(event):
        process = event.object
        journal.write(
            type(event).__name__,
            process.tool,
            process.pid == os.getpid() != process._parent_pid,
            process.registry is registry is get_current_registry(),
            get_current_registry().settings['converter.tool'],
            process.bound_address.startswith('tcp://127.0.0.1:'),
            not process.rep_stream.closed(),
        )

    registry.registerHandler(subscribe, [IZMQProcessEvent])
    return registry


def test_process():
    assert verifyClass(IZMQProcess, ZMQProcess)
    assert verifyObject(IZMQProcess, Process())
    assert verifyObject(IZMQProcess, Converter('ffmpeg'))


def test_started_process(start):
    assert verifyObject(IZMQProcess, start())


def test_message_handler():
    assert verifyClass(IZMQMessageHandler, ZMQMessageHandler)
    assert verifyObject(IZMQMessageHandler, MessageHandler(Process(), None, print))
    assert verifyObject(IZMQMessageHandler, ZMQMessageHandler(None, None, print, Handler))


@pytest.mark.parametrize(('interface', 'event_class'), EVENTS)
def test_event(interface, event_class):
    process = object()
    event = event_class(process)
    assert verifyClass(interface, event_class)
    assert verifyObject(interface, event)
    assert event.object is process
    assert IZMQProcessEvent.providedBy(event)
    # As in version 2: subscribers to IObjectEvent get them, too.
    assert IObjectEvent.providedBy(event)


def test_events_differ():
    assert not IZMQProcessStartedEvent.implementedBy(ZMQProcessStoppedEvent)
    assert not IZMQProcessStoppedEvent.implementedBy(ZMQProcessStartedEvent)


def test_events_of_a_process(start, ask, registry, journal):
    process = start(factory=Converter, tool='convert', registry=registry)
    rest = ['convert', 'True', 'True', 'ffmpeg', 'True', 'True']
    assert journal.read() == [' '.join(['ZMQProcessStartedEvent', *rest])]
    assert ask(process, ['echo', 1]) == [200, 1]
    process.stop()
    assert process.exitcode == 0
    assert journal.read() == [
        ' '.join(['ZMQProcessStartedEvent', *rest]),
        ' '.join(['ZMQProcessStoppedEvent', *rest]),
    ]


def test_events_go_to_the_current_registry(config, start, journal):
    config.add_subscriber(lambda event: journal.write(event.object.name), IZMQProcessStartedEvent)
    process = start()
    assert journal.read() == [process.name]


def test_events_of_objects(start, registry, journal):
    """Subscribers to the interface of the process get its events, too."""

    def subscribe(process, event):
        journal.write(type(event).__name__)

    registry.registerHandler(subscribe, [IZMQProcess, Interface])
    registry.registerHandler(
        lambda event: registry.subscribers((event.object, event), None), [IObjectEvent]
    )
    process = start(factory=Converter, tool='convert', registry=registry)
    process.stop()
    assert [line for line in journal.read() if ' ' not in line] == [
        'ZMQProcessStartedEvent',
        'ZMQProcessStoppedEvent',
    ]


def test_no_event_without_a_socket(start, registry, journal):
    first = start()
    second = Converter('convert', first.bound_address, registry=registry)
    second.start()
    with pytest.raises(ZMQBindError):
        second.wait_ready()
    second.join(5)
    assert second.exitcode == 1
    assert journal.read() == []


def test_no_event_in_the_parent(registry, journal):
    process = Converter('convert', registry=registry)
    process.stop()
    assert journal.read() == []


def test_failing_subscriber_to_the_start(registry, journal):
    def fail(event):
        raise LookupError(f'no such tool: {event.object.tool}')

    registry.registerHandler(fail, [IZMQProcessStartedEvent])
    process = Converter('convert', registry=registry)
    process.start()
    with pytest.raises(LookupError, match='no such tool: convert'):
        process.wait_ready()
    process.join(5)
    assert process.exitcode == 1
    assert 'ZMQProcessStoppedEvent' not in str(journal.read())  # it had not started


def test_slow_subscriber_to_the_end(start, registry, tmp_path):
    """Messages that come in meanwhile are refused, not lost."""
    path = tmp_path / 'wait'

    def wait(event):
        path.touch()
        while path.exists():
            time.sleep(0.001)  # no event announces the removal

    registry.registerHandler(wait, [IZMQProcessStoppedEvent])
    process = start(factory=Converter, tool='convert', registry=registry)
    with RawPeer(process.bound_address) as peer:
        assert peer.ask('echo', 1) == [200, 1]
        stopping = threading.Thread(target=process.stop)
        stopping.start()
        wait_until(path.exists)
        peer.send(request('echo', 2) + request('echo', 3))
        assert not zmq.select([peer.socket], [], [], 0.2)[0]
        path.unlink()
        assert [peer.read_reply()[0], peer.read_reply()[0]] == [503, 503]
        stopping.join()


def test_failing_subscriber_to_the_end(start, ask, registry, journal):
    def fail(event):
        logging.getLogger().addHandler(logging.FileHandler(journal.path))
        raise LookupError(f'no such tool: {event.object.tool}')

    registry.registerHandler(fail, [IZMQProcessStoppedEvent])
    process = start(factory=Converter, tool='convert', registry=registry)
    assert ask(process, ['echo', 1]) == [200, 1]
    process.stop()
    assert process.exitcode == 0
    assert 'LookupError: no such tool: convert' in journal.read()
    assert start(process.bound_address).bound_address == process.bound_address  # it was closed
