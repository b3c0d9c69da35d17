# SPDX-License-Identifier: ZPL-2.1
"""The collector of prometheus_client, and the page ``/zmq/metrics``."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from pyramid.response import Response

from pyams_zmq.monitor.condition import DOWN, DRAINING, condition_of
from pyams_zmq.monitor.inquiry import ask_all
from pyams_zmq.monitor.question import Answer, Question
from pyams_zmq.monitor.shared import SharedAnswers
from pyams_zmq.monitor.statistics import MethodStatistics, Statistics, read_statistics
from pyams_zmq.monitor.views import add_page
from pyams_zmq.wire.fork_barrier import ForkBarrier

TIMEOUT = 1.0
"""Seconds in which the services and the database of the outbox must answer"""


def add_metrics(config: Any) -> None:
    """Add the collector and its page to an application; a second call changes nothing."""
    if getattr(config.registry, 'zmq_metrics', None) is not None:
        return
    collector = config.registry.zmq_metrics = MetricsCollector(config.registry)
    metrics = CollectorRegistry()
    metrics.register(collector)
    add_page(config, 'zmq_metrics', '/zmq/metrics', partial(_show, metrics))


def _show(metrics: CollectorRegistry, request: Any) -> Response:
    encode, content_type = choose_encoder(request.headers.get('Accept', ''))
    response = Response(encode(metrics))
    response.headers['Content-Type'] = content_type
    return response


class MetricsCollector:
    """Asks all services of an application when metrics are collected, for a second at most.

    Register it with a :class:`prometheus_client.CollectorRegistry`; that does not ask them.

    :param registry: registry of the application
    """

    def __init__(self, registry: Any):
        self._registry = registry
        self._answers = SharedAnswers(self._ask)
        self._barrier = ForkBarrier()

    def describe(self) -> Iterable[Metric]:
        """Return the metrics without values; prometheus_client compares their names."""
        return [*_collect_services({}), *_collect_outbox(Answer(_Messages({}, {})))]

    def collect(self) -> Iterable[Metric]:
        """Return the metrics with their values."""
        services, outbox = self._answers.get()
        families = _collect_services(services)
        return families if outbox is None else chain(families, _collect_outbox(outbox))

    def _ask(self) -> 'tuple[Mapping[str, Answer], Answer | None]':
        question = None
        if self._registry.zmq_clients.outbox is not None:
            question = Question(self, 'the database of the outbox', self._count, TIMEOUT)
            question.start()
        services = ask_all(self._registry, 'pyams_zmq.stats', TIMEOUT)
        return services, None if question is None else question.wait()

    def _count(self) -> '_Messages':
        outbox = self._registry.zmq_clients.outbox
        with self._barrier.hold():  # the driver of the database may hold locks
            return _Messages(outbox.count_waiting(), outbox.count_dead())


class _Messages(NamedTuple):
    """How many messages are in the outbox, by service."""

    waiting: Mapping[str, int]
    dead: Mapping[str, int]


def _collect_services(answers: Mapping[str, Answer]) -> Iterator[Metric]:
    conditions = {name: condition_of(answer).status for name, answer in answers.items()}
    yield _gauge(
        'zmq_up',
        'Whether the service has answered within a second.',
        {name: int(status != DOWN) for name, status in conditions.items()},
    )
    yield _gauge(
        'zmq_draining',
        'Whether the service finishes its calls and takes no others.',
        {name: int(status == DRAINING) for name, status in conditions.items() if status != DOWN},
    )
    found = {
        name: statistics
        for name, answer in answers.items()
        if isinstance(answer.result, dict)
        and (statistics := read_statistics(answer.result)) is not None
    }
    yield from _collect_calls(found)
    yield from _collect_load(found)


def _collect_calls(services: Mapping[str, Statistics]) -> Iterator[Metric]:
    labels = ['service', 'method']
    calls = CounterMetricFamily('zmq_calls', 'Calls that have ended.', labels=labels)
    errors = CounterMetricFamily('zmq_errors', 'Calls with an error as reply.', labels=labels)
    durations = HistogramMetricFamily(
        'zmq_call_duration_seconds', 'Time that a method has taken.', labels=labels
    )
    for name, service in services.items():
        for method, statistics in service.methods.items():
            calls.add_metric([name, method], statistics.calls)
            errors.add_metric([name, method], statistics.errors)
            total = statistics.mean * statistics.calls
            durations.add_metric([name, method], _buckets_of(statistics), total)
    yield from (calls, errors, durations)
    for key, text in (
        ('refused', 'Calls that were refused, because too many wait for instance.'),
        ('repeated', 'Calls that were given to another worker after the first one was lost.'),
        ('lost', 'Calls whose worker was lost.'),
    ):
        counter = CounterMetricFamily(f'zmq_{key}', text, labels=['service'])
        for name, service in services.items():
            counter.add_metric([name], getattr(service, key))
        yield counter


def _buckets_of(method: MethodStatistics) -> list[tuple[str, float]]:
    return [
        *((str(float(longest)), count) for longest, count in method.buckets),
        ('+Inf', method.calls),
    ]


def _collect_load(services: Mapping[str, Statistics]) -> Iterator[Metric]:
    for metric, key, text in (
        ('in_flight', 'in_flight', 'Calls in hand.'),
        ('queue_length', 'queue', 'Calls that wait for a worker.'),
        ('queue_bytes', 'queue_bytes', 'Size of the calls that wait for a worker.'),
        ('oldest_call_age_seconds', 'oldest', 'Time for which the oldest call waits.'),
        ('memory_bytes', 'bytes', 'Resident memory of the process, and of the workers of a pool.'),
        ('uptime_seconds', 'uptime', 'Time since the service was started.'),
    ):
        values = {name: getattr(service, key) for name, service in services.items()}
        yield _gauge(f'zmq_{metric}', text, values)
    workers = GaugeMetricFamily(
        'zmq_workers', 'Workers by their state.', labels=['service', 'state']
    )
    jobs = GaugeMetricFamily(
        'zmq_jobs', 'Jobs in the journal.', labels=['service', 'type', 'state']
    )
    for name, service in services.items():
        # All of them: else a series would end, not fall to 0.
        states = Counter({'idle': 0, 'busy': 0, 'leaving': 0})
        states.update(worker.state for worker in service.workers)
        for state, number in states.items():
            workers.add_metric([name, state], number)
        for type_, numbers in ({} if service.jobs is None else service.jobs.types).items():
            for state, number in numbers.items():
                jobs.add_metric([name, type_, state], number)
    yield from (workers, jobs)


def _collect_outbox(answer: Answer) -> Iterator[Metric]:
    is_up = answer.error is None
    yield GaugeMetricFamily(
        'zmq_outbox_up', 'Whether the database of the outbox has answered.', int(is_up)
    )
    if is_up:
        family = GaugeMetricFamily(
            'zmq_outbox_messages',
            'Messages that are not sent yet, and those that their service has refused.',
            labels=['service', 'state'],
        )
        messages: _Messages = answer.result
        for name in sorted({*messages.waiting, *messages.dead}):
            family.add_metric([name, 'waiting'], messages.waiting.get(name, 0))
            family.add_metric([name, 'dead'], messages.dead.get(name, 0))
        yield family


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=['service'])
    for service, value in values.items():
        family.add_metric([service], value)
    return family
