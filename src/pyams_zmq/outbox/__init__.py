# SPDX-License-Identifier: ZPL-2.1
"""The outbox: messages that are written by the transaction of the application, and sent from there.

A database of the application has the entries, see :mod:`pyams_zmq.outbox.storage`. Each process
sends those of its own transactions, and one process of a machine those of processes that have
ended.
"""
