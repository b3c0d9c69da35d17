# SPDX-License-Identifier: ZPL-2.1
"""Writes the page of all settings, ``settings.rst``, from the table of options in the code."""

from itertools import groupby
from pathlib import Path
from typing import Any

from pyams_zmq.config.options import OPTIONS, Option

PAGE = Path(__file__).parent / 'settings.rst'

INTRODUCTION = """\
.. Generated from the table of options in the code: run "python docs/settings_page.py".

========
Settings
========

``pyams_zmq.NAME.OPTION`` is an option of the service ``NAME``. Each option is also a keyword
argument of ``config.add_zmq_process(NAME, ...)``, which the setting overrides; see
:doc:`howto/pyramid`. A value may be text, as in an ini file, or an object of Python. An empty
setting counts as missing.

``pyams_zmq.application``, a text, names the application; by default its ini file and section do,
see :ref:`applications`.

``pyams_zmq.outbox``, ``none``, ``sqlalchemy`` or ``zodb``, is how messages on commit are stored,
by default ``none``; see :doc:`howto/transactions`. With ``sqlalchemy``,
``pyams_zmq.outbox_session`` is the attribute of requests that has the session, by default
``dbsession``, and ``pyams_zmq.outbox_metadata`` the dotted name of the metadata that gets the
table. With ``zodb``, ``pyams_zmq.outbox_database`` is the name of one of several databases. The
arguments of ``config.set_zmq_outbox`` are the same; these settings override them.

Addresses are explained in :doc:`howto/addresses`, users and keys in :doc:`howto/security`, limits
there, in :doc:`howto/scale` and in :doc:`howto/deploy`. A file or folder is an absolute path, an
asset of a package (``package:path``), or a path relative to the folder of the ini file.
"""

COLUMNS = ('Option', 'Type', 'Default', 'Unit', 'Meaning')
WIDTHS = '22 20 16 10 32'


def render() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    for group, options in groupby(OPTIONS.values(), lambda option: option.group):
        title = group.value
        parts.append(f'\n{title}\n{"=" * len(title)}\n\n.. list-table::\n   :header-rows: 1\n')
        parts.append(f'   :widths: {WIDTHS}\n\n')
        parts.extend(map(_render_row, [COLUMNS, *map(_cells_of, options)]))
    return ''.join(parts)


def _cells_of(option: Option) -> tuple[str, ...]:
    default = option.default or '; '.join(map(_render_value, option.defaults)) or 'none'
    if len(option.defaults) > 1:
        default += ' for a pool'
    kind = option.kind.label.removeprefix('a ').removeprefix('an ')
    return f'``{option.name}``', kind, default, option.unit, option.text


def _render_value(value: Any) -> str:
    mebibytes, rest = divmod(value, 1 << 20) if isinstance(value, int) else (0, 1)
    if value is None:
        return ''
    if isinstance(value, bool):
        return str(value).lower()
    return f'{value} ({mebibytes} MiB)' if mebibytes and not rest else str(value)


def _render_row(cells: tuple[str, ...]) -> str:
    first, *others = cells
    return f'   * - {first}\n' + ''.join(f'     - {cell}'.rstrip() + '\n' for cell in others)


if __name__ == '__main__':
    PAGE.write_text(render(), encoding='utf-8')
