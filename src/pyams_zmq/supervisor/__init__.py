# SPDX-License-Identifier: ZPL-2.1
"""Processes that are started again when they crash."""

from pyams_zmq.supervisor.driver import Supervisor
from pyams_zmq.supervisor.process import SupervisorProcess

__all__ = ['Supervisor', 'SupervisorProcess']
