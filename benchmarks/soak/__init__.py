# SPDX-License-Identifier: ZPL-2.1
"""Mixed load and faults for minutes, and checks that nothing is wrong, lost or leaked."""
