# SPDX-License-Identifier: ZPL-2.1
"""What a monitoring system asks of the declared services."""
