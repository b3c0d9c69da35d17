# SPDX-License-Identifier: ZPL-2.1
"""Statistics of a pool, and who may read them."""

from ipaddress import ip_address
from types import SimpleNamespace

import pytest

from app.program import is_running
from checks import freeze, wait_until
from pool_checks import TIMEOUT, client_of, workers_of
from pool_handlers import Pool
from pyams_zmq.exceptions import (
    ZMQMessageError,
    ZMQRemoteError,
    ZMQStartError,
    ZMQTimeoutError,
)
from pyams_zmq.pool.inspection import PoolInspection
from pyams_zmq.process import inspection as inspection_module


def test_stats_before_ready():
    with pytest.raises(ZMQStartError, match='was not started'):
        Pool().stats()


def test_stats(pool, monkeypatch):
    process = pool()
    with client_of(process) as client:
        for _ in range(10):
            client.call('echo', 1)
        with pytest.raises(ZMQRemoteError, match='404'):
            client.call('nothing_such')
        stats = client.call('pyams_zmq.stats')
    assert stats['calls'] == 11
    assert stats['errors'] == 1
    assert stats['methods']['echo']['calls'] == 10
    assert 0 < stats['methods']['echo']['p50'] <= stats['methods']['echo']['max'] < TIMEOUT
    assert stats['methods']['(others)']['errors'] == 1
    assert stats['addresses'][0] == process.bound_address
    for worker in stats['workers']:
        assert is_running(worker['pid'])
        assert worker['state'] == 'idle'
    wait_until(lambda: process.stats()['workers'][0]['memory'] > 5, TIMEOUT)


def test_access_to_stats(pool, monkeypatch):
    monkeypatch.setattr(inspection_module, 'parse_ip', lambda address: ip_address('192.0.2.1'))
    process = pool(
        factory=type('Open', (Pool,), {'stats_users': {'alice'}}),
        auth=['alice:a', 'bob:b'],
        workers=1,
    )
    with client_of(process, auth='alice:a') as client:
        assert client.call('pyams_zmq.stats')['calls'] == 0
    with client_of(process, auth='bob:b') as client:
        with pytest.raises(ZMQRemoteError, match=r'403 .*stats_users') as error:
            client.call('pyams_zmq.stats')
        assert error.value.status == 403
        assert client.call('echo', 1) == 1
    assert process.stats()['calls'] == 1


def test_stats_of_a_pool_whose_broker_is_away(pool):
    process = pool(workers=1)
    freeze(process.stats()['pid'])
    with pytest.raises(ZMQTimeoutError, match=r'did not reply in 0\.1 s'):
        process.stats(timeout=0.1)


def test_questions(pool):
    process = pool(workers=2)
    with client_of(process) as client:
        ping = client.call('pyams_zmq.ping')
        assert (ping['name'], ping['kind'], ping['workers']) == (process.name, 'pool', 2)
        assert ping['pid'] == process.stats()['pid']
        echo = client.call('pyams_zmq.methods')['echo']
        assert (echo['kind'], echo['signature']) == ('call', '(args)')
        stats = client.call('pyams_zmq.stats')
        assert stats.keys() >= {'oldest', 'memory', 'uptime', 'version', 'jobs'}
        assert stats['jobs'] is None
        with pytest.raises(ZMQRemoteError, match='404'):
            client.call('pyams_zmq.nothing_such')


def test_restart_and_reload(pool):
    process = pool(workers=2)
    former = workers_of(process)
    with client_of(process) as client:
        assert client.call('pyams_zmq.reload') is None
        assert client.call('pyams_zmq.ping')['workers'] == 2
        assert workers_of(process) == former
        assert client.call('pyams_zmq.restart') is None
        wait_until(
            lambda: len(workers_of(process)) == 2 and not former & workers_of(process), TIMEOUT
        )


def test_restart_of_a_pool_that_has_ended():
    """Its broker ends soon, too; another process may have the process id of the pool."""
    inspection = PoolInspection(SimpleNamespace(_parent_pid=1, draining=False), 'converter', None)
    with pytest.raises(ZMQMessageError, match='The service is stopping'):
        inspection.restart()


def test_oldest_call(pool, tmp_path):
    process = pool(workers=1)
    with client_of(process) as client:
        for _ in range(3):
            client.send('wait_for', str(tmp_path / 'file'))
        wait_until(lambda: client.call('pyams_zmq.stats')['queue'] == 2, TIMEOUT)
        assert client.call('pyams_zmq.stats')['oldest'] > 0
        (tmp_path / 'file').unlink()
