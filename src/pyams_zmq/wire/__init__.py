# SPDX-License-Identifier: ZPL-2.1
"""Bytes and addresses; nothing here opens a socket."""
