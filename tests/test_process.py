#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""Life of a process: start, ready, stop, and the sad cases of each."""

import threading

import pytest
from pyramid.registry import Registry
from pyramid.threadlocal import get_current_registry

from handlers import ExitingSetup, FailingSetup, Process
from pyams_zmq.exceptions import ZMQBindError, ZMQStartError


def test_echo(start, ask):
    process = start()
    assert ask(process, ['echo', {'a': 1}]) == [200, {'a': 1}]
    process.stop()
    assert process.exitcode == 0


def test_address_in_use(start):
    process = start()
    second = Process(process.bound_address)
    second.start()
    with pytest.raises(ZMQBindError, match='Address already in use'):
        second.wait_ready()
    second.join(5)
    assert second.exitcode == 1


def test_failing_setup():
    process = FailingSetup()
    process.start()
    with pytest.raises(LookupError, match='no such tool: ffmpeg'):
        process.wait_ready()
    process.join(5)
    assert process.exitcode == 1


def test_exit_before_ready():
    process = ExitingSetup()
    process.start()
    with pytest.raises(ZMQStartError, match='exit code 7'):
        process.wait_ready()
    process.join(5)


class Watched(Process):
    """Notes the registries which its threads see."""

    notes = None

    def _enter_thread(self):
        super()._enter_thread()
        with open(self.notes, 'a', encoding='utf-8') as notes:
            same = get_current_registry() is self.registry
            notes.write(f'{threading.current_thread().name}: {same}\n')


def test_registry_of_threads(start, tmp_path):
    notes = tmp_path / 'notes'
    process = start(
        factory=type('Noted', (Watched,), {'notes': notes}), registry=Registry('theirs')
    )
    process.stop()
    assert sorted(notes.read_text().splitlines()) == [
        'MainThread: True',
        'pyams_zmq authenticator: True',
        'pyams_zmq watchdog: True',
    ]
