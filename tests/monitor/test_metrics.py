# SPDX-License-Identifier: ZPL-2.1
"""The page ``/zmq/metrics``: what it says of services in all conditions, and its format."""

import re
import sys
import threading

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_text
from pyramid.exceptions import ConfigurationError
from pyramid.request import Request
from sqlalchemy import create_engine

import pyams_zmq.metrics
from pyams_zmq.monitor import question, shared
from watched_services import PASSWORD, PING

OPENMETRICS = 'application/openmetrics-text; version=1.0.0'
STATS = {
    **PING,
    'uptime': 60.5,
    'memory': 10.0,
    'calls': 5,
    'refused': 1,
    'repeated': 2,
    'lost': 3,
    'in_flight': 4,
    'queue': 6,
    'queue_bytes': 7,
    'queue_limit': None,
    'oldest': 0.5,
    'methods': {
        'echo': {
            'calls': 4,
            'errors': 1,
            'mean': 0.25,
            'buckets': [[0.1, 1], [1, 3]],
        }
    },
    'workers': [{'pid': 1, 'state': 'busy', 'memory': 10.0}],
    'jobs': None,
}
POOL = {
    **STATS,
    'kind': 'pool',
    'workers': [
        {'state': 'busy', 'memory': 20.0},
        {'state': 'busy', 'memory': None},
        {'state': 'idle', 'memory': 1.0},
    ],
    'jobs': {'running': 1, 'types': {'render': {'running': 1, 'queued': 2}}},
}
MEBIBYTE = 1 << 20
STATES = ('idle', 'busy', 'leaving')
LABELS = ('service', 'method', 'type', 'state', 'le')


@pytest.fixture
def get(services):
    """Request a page of the application; return the response."""
    services.config.include('pyams_zmq.metrics')

    def send(path='/zmq/metrics', **headers):
        app = services.config.make_wsgi_app()
        return Request.blank(path, headers=headers).get_response(app)

    return send


@pytest.fixture
def scrape(get):
    """Return the samples of the page, by their name and the values of their labels."""

    def read():
        families = parse_text(get().text)
        return {
            (sample.name, *(sample.labels[key] for key in LABELS if key in sample.labels)): (
                sample.value
            )
            for family in families
            for sample in family.samples
        }

    return read


def test_statistics_of_a_process(services, scrape):
    services.answer('converter', stats=[200, STATS])
    assert scrape() == {
        ('zmq_up', 'converter'): 1,
        ('zmq_draining', 'converter'): 0,
        ('zmq_calls_total', 'converter', 'echo'): 4,
        ('zmq_errors_total', 'converter', 'echo'): 1,
        ('zmq_call_duration_seconds_bucket', 'converter', 'echo', '0.1'): 1,
        ('zmq_call_duration_seconds_bucket', 'converter', 'echo', '1.0'): 3,
        ('zmq_call_duration_seconds_bucket', 'converter', 'echo', '+Inf'): 4,
        ('zmq_call_duration_seconds_count', 'converter', 'echo'): 4,
        ('zmq_call_duration_seconds_sum', 'converter', 'echo'): 1,
        ('zmq_refused_total', 'converter'): 1,
        ('zmq_repeated_total', 'converter'): 2,
        ('zmq_lost_total', 'converter'): 3,
        ('zmq_in_flight', 'converter'): 4,
        ('zmq_queue_length', 'converter'): 6,
        ('zmq_queue_bytes', 'converter'): 7,
        ('zmq_oldest_call_age_seconds', 'converter'): 0.5,
        ('zmq_memory_bytes', 'converter'): 10 * MEBIBYTE,
        ('zmq_uptime_seconds', 'converter'): 60.5,
        ('zmq_workers', 'converter', 'idle'): 0,
        ('zmq_workers', 'converter', 'busy'): 1,
        ('zmq_workers', 'converter', 'leaving'): 0,
    }


def test_statistics_of_a_pool(services, scrape):
    services.answer('pool', stats=[200, POOL])
    samples = scrape()
    assert samples['zmq_memory_bytes', 'pool'] == 31 * MEBIBYTE
    assert samples['zmq_workers', 'pool', 'busy'] == 2
    assert samples['zmq_workers', 'pool', 'idle'] == 1
    assert samples['zmq_jobs', 'pool', 'render', 'running'] == 1
    assert samples['zmq_jobs', 'pool', 'render', 'queued'] == 2


def test_all_conditions(services, scrape, set_timeout):
    set_timeout(3)
    services.add_all()
    services.answer('odd', stats=[200, {'methods': 1}])
    services.answer('remote', stats=[403, 'User may not read the statistics'])
    services.answer('full', stats=[200, STATS])
    samples = scrape()
    values = {name: value for (metric, name, *_), value in samples.items() if metric == 'zmq_up'}
    assert {name for name, value in values.items() if not value} == {'down', 'hung', 'refusing'}
    assert len(values) == 11
    assert samples['zmq_calls_total', 'full', 'echo'] == 4


def test_draining(services, scrape):
    services.answer('converter', stats=[200, {**STATS, 'state': 'draining'}])
    samples = scrape()
    assert (samples['zmq_up', 'converter'], samples['zmq_draining', 'converter']) == (1, 1)


@pytest.mark.parametrize('workers', [0, 2])
def test_real_services(services, scrape, workers):
    services.run('echo', workers=workers)
    services.config.registry.zmq_clients.get('echo').call('echo', 1)
    samples = scrape()
    assert samples['zmq_up', 'echo'] == 1
    assert samples['zmq_draining', 'echo'] == 0
    assert samples['zmq_calls_total', 'echo', 'echo'] == 1
    assert samples['zmq_errors_total', 'echo', 'echo'] == 0
    assert samples['zmq_call_duration_seconds_bucket', 'echo', 'echo', '+Inf'] == 1
    assert samples['zmq_call_duration_seconds_sum', 'echo', 'echo'] > 0
    assert sum(samples['zmq_workers', 'echo', state] for state in STATES) == (workers or 1)
    assert samples['zmq_memory_bytes', 'echo'] > 10 * MEBIBYTE
    assert samples['zmq_uptime_seconds', 'echo'] > 0


# Format


def test_page(services, get):
    services.answer('converter', stats=[200, POOL])
    response = get()
    assert response.status_int == 200
    assert response.headers['Content-Type'].startswith('text/plain; version=0.0.4')
    assert response.headers['Cache-Control'] == 'no-store'
    assert PASSWORD not in response.text


def test_openmetrics(services, get):
    services.answer('converter', stats=[200, POOL])
    response = get(Accept=OPENMETRICS)
    assert response.headers['Content-Type'].startswith('application/openmetrics-text')
    names = {family.name for family in parse_open(response.text)}  # it raises for a bad format
    assert {'zmq_up', 'zmq_calls', 'zmq_call_duration_seconds', 'zmq_jobs'} <= names


def test_names(services, get):
    """The rules of `promtool check metrics`."""
    services.answer('converter', stats=[200, POOL])
    families = list(parse_text(get().text))
    for family in families:
        assert re.fullmatch('zmq_[a-z_]+', family.name), family.name
        assert family.documentation.endswith('.'), family.name
        # Base units at the end, and no suffix that is of another type.
        assert not re.search('milli|micro|mebi|mega|minutes|hours', family.name), family.name
        assert not re.search('_(count|sum|bucket|total)$', family.name), family.name
        assert family.type in ('gauge', 'counter', 'histogram'), family.name
        for sample in family.samples:
            assert (family.type == 'counter') == sample.name.endswith('_total'), sample.name
            assert {*sample.labels} <= {*LABELS}, sample.name
    names = [family.name for family in families]
    assert sorted(names) == sorted(set(names))


# The collector


def test_own_registry(services, monkeypatch):
    monkeypatch.setattr(shared, 'MAX_AGE', 60)
    service = services.answer('converter', stats=[200, STATS])
    services.config.include('pyams_zmq.metrics', route_prefix='internal')
    pyams_zmq.metrics.includeme(services.config)
    app = services.config.make_wsgi_app()
    registry = CollectorRegistry(auto_describe=True)
    registry.register(app.registry.zmq_metrics)
    assert service.questions == []  # not asked to register it
    with pytest.raises(ValueError, match='Duplicated timeseries'):
        registry.register(app.registry.zmq_metrics)
    assert registry.get_sample_value('zmq_up', {'service': 'converter'}) == 1
    assert Request.blank('/internal/zmq/metrics').get_response(app).status_int == 200
    assert service.questions == ['pyams_zmq.stats']  # both share the answer


def test_without_the_package(config, monkeypatch):
    monkeypatch.setitem(sys.modules, 'prometheus_client', None)
    monkeypatch.delitem(sys.modules, 'pyams_zmq.monitor.metrics', raising=False)
    with pytest.raises(ConfigurationError, match=r'pip install "pyams_zmq\[metrics\]"$'):
        config.include('pyams_zmq.metrics')


# The outbox; what is in it, see tests/pyramid


def test_database_without_the_table(services, scrape, tmp_path):
    services.answer('converter', stats=[200, STATS])
    engine = create_engine(f'sqlite:///{tmp_path}/app.sqlite')
    services.config.set_zmq_outbox('sqlalchemy', engine=engine)
    samples = scrape()
    engine.dispose()
    assert samples['zmq_up', 'converter'] == 1
    assert samples[('zmq_outbox_up',)] == 0
    assert 'zmq_outbox_messages' not in {name for name, *_ in samples}


def test_database_that_hangs(services, scrape, monkeypatch, set_timeout):
    monkeypatch.setattr(question, 'SLACK', 0)
    set_timeout(1)
    gate = threading.Event()

    def find_engine():
        gate.wait()

    services.answer('converter', stats=[200, STATS])
    services.config.set_zmq_outbox('sqlalchemy', engine=find_engine)
    try:
        samples = scrape()
    finally:
        gate.set()
    assert samples[('zmq_outbox_up',)] == 0
    assert ('zmq_up', 'converter') in samples
