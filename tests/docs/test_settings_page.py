# SPDX-License-Identifier: ZPL-2.1
"""The page of all settings is the one that the table of options makes."""

import re
import runpy
from pathlib import Path

from pyams_zmq.config.options import OPTIONS

DOCS = Path(__file__).parents[2] / 'docs'


def test_page_is_up_to_date():
    page = runpy.run_path(str(DOCS / 'settings_page.py'))
    text = page['PAGE'].read_text(encoding='utf-8')
    assert text == page['render'](), 'run "python docs/settings_page.py"'
    assert re.findall(r'^   \* - ``(\w+)``$', text, re.MULTILINE) == list(OPTIONS)


def test_each_row_is_complete():
    page = runpy.run_path(str(DOCS / 'settings_page.py'))
    for option in OPTIONS.values():
        name, kind, default, unit, meaning = page['_cells_of'](option)
        assert name, kind
        assert default, name
        assert meaning, name
        assert bool(unit) == ('number' in kind or 'integer' in kind), name
