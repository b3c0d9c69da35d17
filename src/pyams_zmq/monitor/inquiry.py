# SPDX-License-Identifier: ZPL-2.1
"""Questions to all services of an application at once."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from pyams_zmq.config.service import services_of
from pyams_zmq.monitor.question import Answer, Question
from pyams_zmq.monitor.version import check_version

__all__ = ['Answer', 'ask_all']


def ask_all(
    registry: Any,
    type: str,  # noqa: A002 - the name of the field
    timeout: float = 1.0,
    names: Iterable[str] | None = None,
) -> dict[str, Answer]:
    """Call a method without arguments of several services at once; return the answers by name.

    Each service is asked in a thread, by a client that is closed afterwards: a connection costs
    half a millisecond, and none is left that a fork or the end of the program would have to close.
    A service that hangs or is down delays neither the others nor the caller. One that runs
    elsewhere (``start = never``) is asked only if that cannot block it, see
    :exc:`.ZMQVersionError`.

    :param registry: registry of the application
    :param type: type of the message, `'pyams_zmq.ping'` for instance
    :param timeout: seconds for all of it
    :param names: names of the services, by default of all that are declared
    """
    questions = {
        name: Question(registry, name, partial(_ask, registry, name, type, timeout), timeout)
        for name in (sorted(services_of(registry)) if names is None else names)
    }
    for question in questions.values():
        question.start()
    return {name: question.wait() for name, question in questions.items()}


def _ask(registry: Any, name: str, type_: str, timeout: float) -> Any:
    client = registry.zmq_clients.make(name)
    try:
        if services_of(registry)[name].start == 'never':  # the others are of this version
            check_version(client, name, timeout)
        return client.call(type_, timeout=timeout, retries=0)
    finally:
        client.close()
