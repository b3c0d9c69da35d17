# SPDX-License-Identifier: ZPL-2.1
"""What log records say beside their text: the service, the method, the job and the ids."""

import logging
from collections.abc import Callable
from contextvars import ContextVar
from multiprocessing import current_process
from typing import Any, NamedTuple
from weakref import WeakSet

FIELDS = ('service', 'method', 'job', 'error_id', 'trace_id')
"""Attributes of log records; one that is not known is missing"""


class PresentCall(NamedTuple):
    """The call whose method runs; see :class:`ServiceFilter`."""

    method: str
    job: str | None = None


present_call: ContextVar[PresentCall | None] = ContextVar('present_call', default=None)

_LOGGER = 'PyAMS (zmq)'

_filters: 'WeakSet[ServiceFilter]' = WeakSet()
_trace_sources: list[Callable[[], str | None]] = []  # at most one


def set_trace_source(find_trace_id: Callable[[], str | None]) -> None:
    """Set the function that returns the id of the present trace, in hexadecimal digits, or None."""
    _trace_sources[:] = [find_trace_id]


def _find_trace_id() -> str | None:
    return _trace_sources[0]() if _trace_sources else None


def has_filters() -> bool:
    """Return True if a :class:`ServiceFilter` exists."""
    return bool(_filters)


def present_service() -> str | None:
    """Return the name of the service that this process belongs to; None in other processes."""
    name: str | None = getattr(current_process(), 'service_name', None)
    return name


def extra(**fields: str | None) -> dict[str, str]:
    """Return the argument `extra` of a log record: the fields that are known.

    :param fields: values of the record; those of this process and of the present trace are added
    """
    found = {'service': present_service(), 'trace_id': _find_trace_id()}
    found.update((name, value) for name, value in fields.items() if value is not None)
    # A factory of the application may set an attribute of this name: a second value is an error.
    # It may ask for the name of the logger, which a record of `makeLogRecord` does not have.
    taken = vars(logging.getLogRecordFactory()(_LOGGER, logging.INFO, '', 0, '', (), None))
    return {name: value for name, value in found.items() if value and name not in taken}


class ServiceFilter(logging.Filter):
    """Adds `service`, `method`, `job`, `error_id` and `trace_id` to all records of a log handler.

    Those that a method logs, with any logger, get the call that runs. It must be made before the
    services are started. A record that has a value keeps it.

    :param missing: value of the attributes that are not known, so that a format can name them
    """

    def __init__(self, missing: Any = None):
        super().__init__()
        self.missing = missing
        _filters.add(self)

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the attributes to a record; return True."""
        call = present_call.get()
        method, job = (None, None) if call is None else call
        values = (present_service(), method, job, None, _find_trace_id())
        for name, value in zip(FIELDS, values, strict=True):
            if getattr(record, name, None) is None:
                setattr(record, name, self.missing if value is None else value)
        return True


def add_service(record: logging.LogRecord) -> bool:
    """Add the service to a record of this package; the filter of its logger in a service."""
    service = present_service()
    if service is not None and not hasattr(record, 'service'):
        record.service = service
    return True


def fields_of(call: object) -> dict[str, str]:
    """Return the argument `extra` of a record about a call, if its `log_fields` say what it is."""
    return extra(**getattr(call, 'log_fields', {}))


def service_fields(name: str) -> dict[str, str]:
    """Return the argument `extra` of a record about a process that a supervisor runs.

    :param name: its name, that of its service unless the supervisor is in the process of a service
    """
    return extra(service=present_service() or name)
