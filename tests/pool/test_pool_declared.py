# SPDX-License-Identifier: ZPL-2.1
"""A pool that an application declares."""

import pytest
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationError

from pool_handlers import PoolMessageHandler
from pyams_zmq.config import services_of
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import running


def declare(**settings):
    config = Configurator(settings={f'pyams_zmq.echo.{key}': settings[key] for key in settings})
    config.include('pyams_zmq')
    return config


@pytest.mark.usefixtures('lock_folder')
def test_declared(tmp_path, ask):
    config = declare(
        address=f'ipc://{tmp_path}/pool',
        handler='pool_handlers.PoolMessageHandler',
        workers='3',
        queue_limit='7',
        max_calls='1000',
        drain_timeout='3',
        stats_users='alice bob',
    )
    config.commit()
    [item] = config.introspector.get_category('ZMQ processes')
    assert item['introspectable']['workers'] == 3
    assert item['introspectable']['factory'] is ZMQPool
    process = services_of(config.registry)['echo'].make_process(config.registry)
    assert isinstance(process, ZMQPool)
    assert process.stats_users == ('alice', 'bob')
    with running(process):
        stats = process.stats()
        assert len(stats['workers']) == 3
        assert stats['queue_limit'] == 7


@pytest.mark.parametrize(
    ('settings', 'text'),
    [
        ({'max_calls': '1'}, 'has max_calls, which is for a pool: set pyams_zmq.echo.workers'),
        ({'worker_address': '*:1'}, 'has worker_address, which is for a pool'),
        ({'workers': 'x'}, 'bad workers'),
        ({'workers': '-1'}, 'bad workers'),
        ({'workers': '2', 'beat_interval': '0'}, 'bad beat_interval'),
        ({'workers': '2', 'factory': 'handlers.Process'}, 'is not a subclass of ZMQPool'),
        ({'workers': '2', 'worker_address': '*:1'}, 'needs worker_auth or worker_curve'),
    ],
)
def test_bad_declaration(settings, text):
    config = declare(address='*:1', handler='pool_handlers.PoolMessageHandler', **settings)
    with pytest.raises(ConfigurationError, match=text):
        config.commit()


@pytest.mark.parametrize('value', ['300.5', 300.5])
def test_fraction_of_a_mebibyte(value):
    config = Configurator()
    config.include('pyams_zmq')
    config.add_zmq_process(
        'echo', address='*:1', handler=PoolMessageHandler, workers=1, max_memory=value
    )
    config.commit()
    process = services_of(config.registry)['echo'].make_process(config.registry)
    assert process.make_worker('ipc://@nowhere').max_memory == 300.5


def test_declared_pool_of_no_workers():
    config = declare(
        address='*:1', handler='pool_handlers.PoolMessageHandler', workers='0', start='never'
    )
    config.commit()
    assert services_of(config.registry)['echo'].factory is ZMQProcess
