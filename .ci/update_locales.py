# SPDX-License-Identifier: ZPL-2.1
"""Bring the message catalogues in step with the source.

Messages marked ``_('...')`` are extracted into the template, the template is merged into each
language's catalogue, and that is compiled. A file whose messages are the same is left alone, so a
second run changes nothing. With ``--check`` nothing is written: the exit status is 1 when a file
is out of step, or when a message has no translation.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.mofile import read_mo, write_mo
from babel.messages.pofile import read_po, write_po

DOMAIN = 'pyams_zmq'
LANGUAGES = ('fr',)

# What a new file's header says; gettext's usual comment would ask for a "FIRST AUTHOR".
ABOUT = {
    'domain': DOMAIN,
    'project': 'PyAMS_zmq',
    'version': '3',
    'header_comment': '# PyAMS_zmq: the messages that people read.\n'
    '# This file is distributed under the same license as the package.',
    'copyright_holder': 'Thierry Florac',
    'msgid_bugs_address': 'tflorac@ulthar.net',
    'last_translator': 'Thierry Florac <tflorac@ulthar.net>',
    'language_team': 'PyAMS <tflorac@ulthar.net>',
    'fuzzy': False,
}

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / 'src' / DOMAIN
LOCALES = SOURCE / 'locales'


def extract() -> Catalog:
    """Return the template of the messages in the source, with files but no line numbers."""
    names = [str(path.relative_to(ROOT)) for path in sorted(SOURCE.rglob('*.py'))]
    pot_create = Path(sys.executable).with_name('pot-create')
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, 'template.pot')
        options = ['--domain', DOMAIN, '--sort-by-file', '--no-linenumbers', '--output', output]
        subprocess.run(
            [pot_create, *options, *names], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        found = read(output)
    template = Catalog(**ABOUT)
    for message in found:
        if message.id:
            template[message.id] = message
    return template


def read(path: Path, locale: str | None = None) -> Catalog:
    """Return the catalogue at a path; an empty one when there is none yet."""
    if not path.exists():
        return Catalog(locale, **ABOUT)
    with path.open('rb') as file:
        return read_mo(file) if path.suffix == '.mo' else read_po(file, locale, DOMAIN)


def write(path: Path, catalog: Catalog) -> None:
    """Write a catalogue, compiled when its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('wb') as file:
        if path.suffix == '.mo':
            write_mo(file, catalog)
        else:
            write_po(file, catalog, width=100)


def texts(catalog: Catalog) -> dict[object, object]:
    """Return what users read: the compiled translations."""
    return {
        (message.context, message.id): message.string
        for message in catalog
        if message.id and message.string and not message.fuzzy
    }


def entries(catalog: Catalog) -> list[object]:
    """Return all that matters in a catalogue: everything but its header, which is dated."""
    found: list[object] = [
        (
            message.context,
            message.id,
            message.string,
            sorted(message.flags),
            [name for name, _line in message.locations],
            message.auto_comments,
            message.user_comments,
        )
        for message in catalog
        if message.id
    ]
    return [*found, sorted(map(str, catalog.obsolete))]


def steps() -> tuple[list[tuple[Path, Catalog]], list[str]]:
    """Return the files that are out of step, as they should be, and what is not translated."""
    stale, untranslated = [], []
    path = LOCALES / f'{DOMAIN}.pot'
    template = extract()
    if not path.exists() or entries(template) != entries(read(path)):
        stale.append((path, template))
    for language in LANGUAGES:
        path = LOCALES / language / 'LC_MESSAGES' / f'{DOMAIN}.po'
        catalog = read(path, language)
        before = entries(catalog)
        catalog.update(template)
        if not path.exists() or entries(catalog) != before:
            stale.append((path, catalog))
        compiled = path.with_suffix('.mo')
        if not compiled.exists() or texts(catalog) != texts(read(compiled)):
            stale.append((compiled, catalog))
        done = texts(catalog)
        untranslated += [
            f'{path.relative_to(ROOT)}: {message.id!r}'
            for message in template
            if message.id and (message.context, message.id) not in done
        ]
    return stale, untranslated


def main(arguments: list[str]) -> int:
    """Update the catalogues, or only check them."""
    check = arguments == ['--check']
    stale, untranslated = steps()
    for path, catalog in stale:
        if not check:
            write(path, catalog)
        print(f'{"out of step" if check else "written"}: {path.relative_to(ROOT)}')
    for message in untranslated:
        print(f'not translated: {message}')
    if check and stale:
        print('To mend it: make locales')
    return int(check and bool(stale or untranslated))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
