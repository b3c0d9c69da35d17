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

import pytest
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
