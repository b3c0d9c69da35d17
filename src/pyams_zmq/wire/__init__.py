# SPDX-License-Identifier: ZPL-2.1
"""Bytes, addresses, and the parts of ØMQ sockets; only inproc endpoints are bound or connected."""
