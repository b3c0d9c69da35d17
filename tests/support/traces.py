# SPDX-License-Identifier: ZPL-2.1
"""Spans of all processes of a test in one file, and a handler for calls that are traced."""

import asyncio
import json
import logging
import os
from pathlib import Path

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from checks import wait_until
from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.handler import zmq_method
from pyams_zmq.interfaces import IZMQProcessStartedEvent
from pyams_zmq.jobs import zmq_job
from pyams_zmq.message import Multipart


class FileExporter(SpanExporter):
    """Appends spans to a file, each as a line of JSON."""

    def __init__(self, path):
        self._path = path

    def export(self, spans):
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for span in spans:
            os.write(fd, (span.to_json(indent=None) + '\n').encode())
        os.close(fd)
        return SpanExportResult.SUCCESS


class Traces:
    """The spans of an application and of its services.

    :param path: path of their file
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.touch()

    def install(self, config):
        """Include the traces; each process that is started makes a provider."""
        config.include('pyams_zmq.otel')
        config.add_subscriber(
            lambda event: self.use(event.object.registry), IZMQProcessStartedEvent
        )
        self.use(config.registry)

    def use(self, registry):
        """Let an application write its spans from this process."""
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(FileExporter(self.path)))
        registry.zmq_tracing.use(self.provider)

    def spans(self):
        """Return the spans that have ended, in the order of their ends."""
        return [Ended(json.loads(line)) for line in self.path.read_text().splitlines()]

    def wait(self, *names):
        """Wait until spans with these names have ended; return them in the order of the names."""
        wait_until(lambda: len(self.spans()) >= len(names))
        spans = {span.name: span for span in self.spans()}
        assert sorted(span.name for span in self.spans()) == sorted(names)
        return [spans[name] for name in names]

    def wait_for_kinds(self, *kinds):
        """Do the same for spans of different kinds."""
        wait_until(lambda: len(self.spans()) >= len(kinds))
        spans = {span.kind: span for span in self.spans()}
        assert sorted(span.kind for span in self.spans()) == sorted(kinds)
        return [spans[kind] for kind in kinds]


class Ended:
    """A span that has ended."""

    def __init__(self, data):
        self.name = data['name']
        self.kind = data['kind'].partition('.')[2]
        self.trace, self.id = data['context']['trace_id'], data['context']['span_id']
        self.state = data['context']['trace_state']
        self.parent = data['parent_id']
        self.attributes = data['attributes']
        self.status = data['status']['status_code']
        self.links = [
            (link['context']['trace_id'], link['context']['span_id']) for link in data['links']
        ]
        self.events = [event['attributes'] for event in data['events']]

    @property
    def identity(self):
        return self.trace, self.id


class TracedMethods:
    """Methods of all kinds, which log with a logger of the application."""

    def echo(self, args):
        logging.getLogger('application').warning('echo')
        return [200, args]

    async def wait(self, args):
        await asyncio.sleep(0)  # one iteration of the loop, so that it goes on as a task
        logging.getLogger('application').warning('wait')
        return [200, args]

    @zmq_method(timeout=20)
    def thread(self, args):
        logging.getLogger('application').warning('thread')
        return [200, args]

    def requested(self, args, *, request):
        return [200, request.path]

    def frames(self, args):
        return Multipart([200, args], [b'frame'])

    def refuse(self, args):
        raise ZMQMessageError(409, 'Not now')

    def text(self, args):
        return 'text'

    def fail(self, args):
        raise LookupError('lost')

    async def fail_later(self, args):
        raise LookupError('lost')

    @zmq_method(timeout=20)
    def fail_in_thread(self, args):
        raise LookupError('lost')

    def fail_to_encode(self, args):
        return object()

    def leave(self, args):
        raise SystemExit(1)

    @zmq_method(timeout=0.1)
    async def late(self, args):
        await asyncio.Event().wait()


class TracedJobs:
    """A job that fails until its second attempt."""

    @zmq_job(retries=1, backoff=0.01)
    def render(self, args, *, job):
        logging.getLogger('application').warning('render')
        if job.attempt == 1:
            raise LookupError('lost')
        return [200, args]

    def note(self, args):
        return [200, args]
