# SPDX-License-Identifier: ZPL-2.1
"""CURVE keys; public names of `pyams_zmq.auth.curve`."""

from pyams_zmq.auth.curve import CurveClient, CurveServer

__all__ = ['CurveClient', 'CurveServer']
