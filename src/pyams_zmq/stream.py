# SPDX-License-Identifier: ZPL-2.1
"""The stream of a process; public names of `pyams_zmq.process.stream`."""

from pyams_zmq.process.stream import ZMQStream

__all__ = ['ZMQStream']
