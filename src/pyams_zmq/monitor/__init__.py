# SPDX-License-Identifier: ZPL-2.1
"""The state of the declared services, for monitoring systems."""
