# SPDX-License-Identifier: ZPL-2.1
"""The outbox: messages that are written by the transaction of the application, and sent from there.

Its entries are in a database of the application. Each process sends those of its own transactions,
and one process of a machine those of processes that have ended. See :doc:`/howto/transactions`.
"""

from pyams_zmq.outbox.outbox import Outbox
from pyams_zmq.outbox.storage import DeadLetter, Entry, Waiting

__all__ = ['DeadLetter', 'Entry', 'Outbox', 'Waiting']
