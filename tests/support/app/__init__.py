# SPDX-License-Identifier: ZPL-2.1
"""A small Pyramid application with a ØMQ process, and what it takes to run programs."""
