# SPDX-License-Identifier: ZPL-2.1
"""A table that is written over the one before, with rich or without it."""

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from pyams_zmq.cli.output import write, write_table
from pyams_zmq.cli.terminal import has_rich

Rows = Sequence[Sequence[str]]
Show = Callable[[Rows, Sequence[str]], None]
"""Shows rows, of which the first one has the titles, and lines below them"""

_CLEAR = '\x1b[H\x1b[J'  # the cursor goes to the top, and what is below is removed


def open_screen() -> AbstractContextManager[Show]:
    """Return a block that shows tables on a terminal."""
    return _RichScreen() if has_rich() else nullcontext(_show_over)


def show_once(rows: Rows, lines: Sequence[str]) -> None:
    """Write a table, and lines below it."""
    write_table(rows)
    for line in lines:
        write(line)


def _show_over(rows: Rows, lines: Sequence[str]) -> None:
    width, _height = shutil.get_terminal_size()
    sys.stdout.write(_CLEAR)
    show_once(rows, [line[:width] for line in lines])


class _RichScreen:
    def __enter__(self) -> Show:
        from rich.live import Live  # noqa: PLC0415 - an extra

        self._live: Any = Live(auto_refresh=False)
        self._live.start()
        return self._show

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def _show(self, rows: Rows, lines: Sequence[str]) -> None:
        from rich.console import Group  # noqa: PLC0415 - an extra
        from rich.table import Table  # noqa: PLC0415 - an extra
        from rich.text import Text  # noqa: PLC0415 - an extra

        titles, *others = rows
        table = Table(box=None, pad_edge=False)
        for number, title in enumerate(titles):
            # Numbers are compared by their last digits.
            table.add_column(title, justify='right' if number > 1 else 'left', overflow='fold')
        for row in others:
            table.add_row(*map(Text, row))
        texts = [Text(line, no_wrap=True, overflow='crop') for line in lines]
        self._live.update(Group(table, *texts), refresh=True)
