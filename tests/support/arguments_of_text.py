# SPDX-License-Identifier: ZPL-2.1
"""A handler whose annotations are texts."""

from __future__ import annotations

import enum
from datetime import date
from decimal import Decimal


class Handler:
    """Has a method with the name of a builtin, which annotations of others contain."""

    class Kind(enum.Enum):
        """A class in the class."""

        ONE = 'a'

    def book(self, day: date, price: Decimal | None):
        return f'{price} of {day}'

    def settings(self, args: dict):
        return args

    def dict(self):
        return {}

    def nested(self, kind: Kind):
        return kind.name
