# SPDX-License-Identifier: ZPL-2.1
"""What a person who calls the methods of a service has to know about them."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pyams_zmq.handler.methods import Method, signature_of

_MAX_LENGTH = 200  # characters of a signature, and of the first line of a docstring


def describe(methods: Mapping[str, Method]) -> dict[str, dict[str, Any]]:
    """Return what is known about the methods of a handler, as JSON types.

    :param methods: the methods by name
    """
    return {name: _describe(method) for name, method in sorted(methods.items())}


def trim(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description that a worker has sent, of a limited size.

    :raises KeyError, TypeError, ValueError: it is incomplete or invalid
    """
    timeout = description['timeout']
    return {
        'signature': _shorten(str(description['signature'])),
        'doc': _shorten(str(description['doc'])),
        'timeout': None if timeout is None else float(timeout),
        'kind': 'job' if description['kind'] == 'job' else 'call',
        'repeatable': bool(description['repeatable']),
    }


def _describe(method: Method) -> dict[str, Any]:
    signature = ''
    with suppress(Exception):  # a builtin without a signature, or a default without a `repr`
        signature = _shorten(str(signature_of(method.call)))
    doc = inspect.getdoc(method.call) or ''
    return {
        'signature': signature,
        'doc': _shorten(doc.partition('\n')[0]),
        'timeout': method.timeout,
        'kind': 'call' if method.job is None else 'job',
        'repeatable': bool(method.repeatable),
    }


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_LENGTH else f'{text[: _MAX_LENGTH - 1]}…'
