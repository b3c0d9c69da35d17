# SPDX-License-Identifier: ZPL-2.1
"""The client of a service for messages that go through the outbox."""

from collections.abc import Sequence
from typing import Any

from pyams_zmq.client import ZMQClient
from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.storage import Entry


class OutboxSender:
    """Adds the messages for one service to transactions; see `pyams_zmq.transaction.Sender`.

    :param service: name of the service
    :param client: its client, whose limits the messages must keep
    :param request: the request, or None
    """

    def __init__(self, outbox: Outbox, service: str, client: ZMQClient, request: Any):
        self.max_message_size = client.max_message_size
        self.keeps_jobs = getattr(client, 'keeps_jobs', True)
        self.service_name = service
        self.address = client.address
        self.tracing = client.tracing
        self._outbox = outbox
        self._service = service
        self._request = request

    def join_transaction(
        self,
        manager: Any,
        type: str,  # noqa: A002 - the name of the field
        data: bytes,
        frames: Sequence[bytes],
        is_job: bool,
    ) -> None:
        """Add an encoded message to the current transaction of a manager."""
        entry = Entry(self._service, type, data, tuple(map(bytes, frames)), is_job)
        self._outbox.add(entry, manager, self._request)
