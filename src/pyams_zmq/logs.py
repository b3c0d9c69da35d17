# SPDX-License-Identifier: ZPL-2.1
"""What log records say about services, for the log handlers of an application."""

from pyams_zmq.wire.log_fields import ServiceFilter

__all__ = ['ServiceFilter']
