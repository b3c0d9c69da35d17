#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

"""PyAMS ZeroMQ helper package: work that must not block a web request runs in a ØMQ process."""

from typing import Any

from pyramid.i18n import TranslationStringFactory

__docformat__ = 'restructuredtext'

_ = TranslationStringFactory('pyams_zmq')


def includeme(config: Any) -> None:
    """Pyramid include: ``config.include('pyams_zmq')``."""
    from pyams_zmq.include import include_package  # noqa: PLC0415 - it imports `_` from here

    include_package(config)
