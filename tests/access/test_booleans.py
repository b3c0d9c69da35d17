# SPDX-License-Identifier: ZPL-2.1
"""A text such as 'false' is never taken for a boolean, nor a name for a collection of names."""

import pytest
from pyramid.config import Configurator

from devices import make_device
from pool_handlers import Pool
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.device import STREAMER, ProcessDevice, ThreadDevice
from pyams_zmq.handler import zmq_method


def set_eager(value):
    config = Configurator()
    config.include('pyams_zmq.testing')
    config.registry.zmq_testing.eager = value


def start_device(factory, value):
    device = make_device(factory, STREAMER, native=value)
    device.start()


@pytest.mark.parametrize('value', ['false', 'true', '', 0, None])
@pytest.mark.parametrize(
    ('name', 'use'),
    [
        ('send_deadline', lambda value: ZMQClient('127.0.0.1:5555', send_deadline=value)),
        ('send_deadline', lambda value: AsyncZMQClient('127.0.0.1:5555', send_deadline=value)),
        ('repeatable', lambda value: zmq_method(repeatable='' if value is None else value)),
        ('eager', set_eager),
        ('native', lambda value: start_device(ThreadDevice, value)),
        ('native', lambda value: start_device(ProcessDevice, value)),
    ],
    ids=['client', 'asyncio', 'method', 'testing', 'thread', 'process'],
)
def test_bad_boolean(name, use, value):
    with pytest.raises(TypeError, match=f'Bad {name} .*: write True or False'):
        use(value)


def test_name_instead_of_names():
    """Each part of the name would be allowed, too."""
    pool = Pool()
    pool.stats_users = 'admin'
    with pytest.raises(TypeError, match="Bad stats_users 'admin': write a collection of names"):
        pool.start()
