# SPDX-License-Identifier: ZPL-2.1
"""Texts that a service has chosen, for a terminal and for one line."""


def printable(text: str) -> str:
    """Return a text without characters that control a terminal or the direction of the text."""
    return ''.join(each if each.isprintable() else '?' for each in text)
