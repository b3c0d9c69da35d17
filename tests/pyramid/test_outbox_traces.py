# SPDX-License-Identifier: ZPL-2.1
"""The traces of messages and jobs that go through the outbox, for each kind of database."""

from contextlib import ExitStack

from checks import wait_until
from pyams_zmq.interfaces import IZMQProcessStartedEvent
from pyams_zmq.pool import ZMQPool
from pyams_zmq.process import ZMQProcess
from pyams_zmq.testing import running
from traces import Traces


def run_services(registry, services, folder):
    """Run the services with the registry of the application; return their processes."""
    addresses = {name: services.settings[f'app.{name}'] for name in services.recorders}
    recorders = services.recorders
    process = ZMQProcess(addresses['converter'], recorders['converter'], registry=registry)
    pool = ZMQPool(addresses['renderer'], recorders['renderer'], registry=registry, workers=1)
    process.name, pool.name = 'converter', 'renderer'
    pool.journal = str(folder / 'journal')
    return process, pool


def test_outbox(make_application, services, tmp_path):
    application = make_application(**{'pyramid.includes': 'pyams_zmq.otel'})
    registry = application.registry
    traces = Traces(tmp_path / 'spans')
    registry.registerHandler(lambda event: traces.use(registry), [IZMQProcessStartedEvent])
    traces.use(registry)
    with traces.provider.get_tracer('test').start_as_current_span('request'):
        assert application.upload('clip') == 200  # no service runs yet
        job = application.get('/render', name='job').json
    assert len(traces.spans()) == 3
    with ExitStack() as stack:
        for process in run_services(registry, services, tmp_path):
            stack.enter_context(running(process))
        wait_until(lambda: len(traces.spans()) == 5)
    spans = {span.name: span for span in traces.spans()}
    for name in ('converter', 'renderer'):
        made, ran = spans[f'create {name}/note'], spans[f'process {name}/note']
        assert (made.trace, made.parent) == spans['request'].identity
        assert (made.kind, ran.kind) == ('PRODUCER', 'CONSUMER')
        assert ran.links == [made.identity]
        assert (ran.trace, ran.parent) != made.identity
        assert ran.parent is None
    assert spans['process renderer/note'].attributes['messaging.message.id'] == job
