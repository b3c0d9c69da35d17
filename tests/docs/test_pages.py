# SPDX-License-Identifier: ZPL-2.1
"""The pages of the documentation are well-formed: their examples run also in a page that is not."""

import re
from pathlib import Path

import pytest
from docutils.core import publish_doctree
from docutils.nodes import paragraph, system_message

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / 'README.rst', ROOT / 'CHANGES.rst', *sorted((ROOT / 'docs').rglob('*.rst'))]
UNDERLINE = re.compile(r'^([=\-~<>])\1+$', re.MULTILINE)
WARNING = 2
OF_SPHINX = ('Unknown interpreted text role', 'Unknown directive type')
"""Errors of what Sphinx adds"""


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_well_formed(page):
    settings = {'report_level': 5, 'halt_level': 5}  # not printed, and no exception
    document = publish_doctree(
        page.read_text(encoding='utf-8'), str(page), settings_overrides=settings
    )
    found = [*document.parse_messages, *document.findall(system_message)]
    texts = [each.astext() for each in found if each['level'] >= WARNING]
    assert [text for text in texts if not any(known in text for known in OF_SPHINX)] == []
    paragraphs = [each.astext() for each in document.findall(paragraph)]
    assert [text for text in paragraphs if UNDERLINE.search(text)] == []  # it was a heading
