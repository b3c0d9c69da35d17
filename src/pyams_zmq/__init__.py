# SPDX-License-Identifier: ZPL-2.1
"""ØMQ processes for work that must not block the requests of a Pyramid application."""

from typing import Any

# Of Pyramid, whose pyramid.i18n takes 0.1 s to import: a client is imported without it.
from translationstring import TranslationStringFactory

_ = TranslationStringFactory('pyams_zmq')


def includeme(config: Any) -> None:
    """Pyramid include: ``config.include('pyams_zmq')``."""
    from pyams_zmq.include import include_package  # noqa: PLC0415 - it imports `_` from here

    include_package(config)
