# SPDX-License-Identifier: ZPL-2.1
"""The pages ``/zmq/live``, ``/zmq/health`` and ``/zmq/ready``."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from pyramid.response import Response

from pyams_zmq.monitor.condition import DOWN, UP, Condition, condition_of
from pyams_zmq.monitor.inquiry import ask_all
from pyams_zmq.monitor.shared import SharedAnswers
from pyams_zmq.monitor.views import add_page

TIMEOUT = 1.0
"""Seconds in which each service must answer"""

_OK = 200
_UNAVAILABLE = 503


def add_health(config: Any) -> None:
    """Add the pages to an application; a second call changes nothing."""
    if getattr(config.registry, 'zmq_health', None) is not None:
        return
    health = config.registry.zmq_health = Health(config.registry)
    add_page(config, 'zmq_live', '/zmq/live', show_live)
    add_page(config, 'zmq_health', '/zmq/health', health.show)
    add_page(config, 'zmq_ready', '/zmq/ready', health.show)


def show_live(request: Any) -> Response:  # noqa: ARG001 - a view has it
    """Answer without asking a service: this process handles requests."""
    return Response(json_body={'status': UP})


class Health:
    """The conditions of the services of an application, as requests see them.

    :param registry: registry of the application
    """

    def __init__(self, registry: Any):
        self._answers = SharedAnswers(partial(_ask, registry))

    def show(self, request: Any) -> Response:
        """Answer with the conditions of all services, and status 503 if one is down or drains."""
        conditions = self._answers.get()
        is_good = all(condition.status == UP for condition in conditions.values())
        return Response(
            status=_OK if is_good else _UNAVAILABLE,
            json_body={
                'status': UP if is_good else DOWN,
                'services': {name: _describe(each) for name, each in conditions.items()},
            },
        )


def _ask(registry: Any) -> Mapping[str, Condition]:
    answers = ask_all(registry, 'pyams_zmq.ping', TIMEOUT)
    return {name: condition_of(answer) for name, answer in answers.items()}


def _describe(condition: Condition) -> dict[str, str]:
    described = {'status': condition.status}
    if condition.reason is not None:
        described['error'] = condition.reason
    return described
