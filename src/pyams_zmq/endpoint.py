# SPDX-License-Identifier: ZPL-2.1
"""Addresses; public names of `pyams_zmq.wire.endpoint`."""

from pyams_zmq.wire.endpoint import Endpoint

__all__ = ['Endpoint']
