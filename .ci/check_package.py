# SPDX-License-Identifier: ZPL-2.1
"""Check the distributions in a directory: ``check_package.py dist``.

The wheel must hold every file of ``src/pyams_zmq``, the sdist every file of the checkout. Then the
wheel is installed in a fresh environment outside the checkout, where every module must import and
every data file must be found.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = 'pyams_zmq'
# Files of the checkout that mean nothing outside it.
NOT_SHIPPED = {'.gitignore', '.gitattributes'}
# The package must not lose these, even where the checkout did.
INDISPENSABLE = {
    'py.typed',
    'doctests/README.rst',
    'locales/pyams_zmq.pot',
    'locales/fr/LC_MESSAGES/pyams_zmq.mo',
    'locales/fr/LC_MESSAGES/pyams_zmq.po',
}

# These need extras: SQLAlchemy, prometheus_client, OpenTelemetry, rich; or a ZODB.
OPTIONAL = (
    *('pyams_zmq.outbox.sql', 'pyams_zmq.outbox.zodb', 'pyams_zmq.outbox.lanes'),
    'pyams_zmq.monitor.metrics',
    'pyams_zmq.monitor.tracing',
    'pyams_zmq.cli.job_bars',
)

# Run by the fresh environment, outside the checkout; the arguments are data files.
TRY_INSTALLED = f"""
import importlib, importlib.resources, pkgutil, sys
import pyams_zmq

assert 'site-packages' in pyams_zmq.__file__, pyams_zmq.__file__
found = [module.name for module in pkgutil.walk_packages(pyams_zmq.__path__, 'pyams_zmq.')]
names = [name for name in found if not name.startswith({OPTIONAL!r})]
for name in names:
    importlib.import_module(name)
for name in sys.argv[1:]:
    assert importlib.resources.files('pyams_zmq').joinpath(name).read_bytes() is not None, name
print(len(names) + 1, 'modules import,', len(sys.argv) - 1, 'data files are there')
"""


def files_of_checkout() -> set[str]:
    """Return what git tracks or would track; of an unpacked sdist, what it lists."""
    if (ROOT / '.git').exists():
        command = ['git', 'ls-files', '--cached', '--others', '--exclude-standard', '-z']
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        names = listing.stdout.split('\0')
    else:
        sources = ROOT / 'src' / f'{PACKAGE}.egg-info' / 'SOURCES.txt'
        names = sources.read_text(encoding='utf-8').splitlines()
    return {name for name in names if name and (ROOT / name).is_file()} - NOT_SHIPPED


def only(directory: Path, pattern: str) -> Path:
    """Return the one file of a directory that matches."""
    found = list(directory.glob(pattern))
    if len(found) != 1:
        sys.exit(f'Expected one {pattern} in {directory}, found {found}')
    return found[0]


def check_contents(wheel: Path, sdist: Path) -> list[str]:
    """Compare both distributions with the checkout; return the package's data files."""
    checkout = files_of_checkout()
    prefix = f'src/{PACKAGE}/'
    package = {name.removeprefix(prefix) for name in checkout if name.startswith(prefix)}
    with zipfile.ZipFile(wheel) as archive:
        installed = {
            name.removeprefix(f'{PACKAGE}/')
            for name in archive.namelist()
            if name.startswith(f'{PACKAGE}/')
        }
    with tarfile.open(sdist) as archive:
        shipped = {name.partition('/')[2] for name in archive.getnames()}
    problems = [
        *(f'not in the checkout: {prefix}{name}' for name in sorted(INDISPENSABLE - package)),
        *(f'not in the wheel: {name}' for name in sorted(package - installed)),
        *(f'in the wheel, not in the checkout: {name}' for name in sorted(installed - package)),
        *(f'not in the sdist: {name}' for name in sorted(checkout - shipped)),
    ]
    if problems:
        sys.exit('\n'.join(problems))
    print(f'{wheel.name}: {len(installed)} files; {sdist.name}: {len(checkout)} files')
    return sorted(name for name in installed if not name.endswith('.py'))


def try_installed(wheel: Path, data_files: list[str]) -> None:
    """Install the wheel in a fresh environment, and import everything there."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(Path(scratch, 'env'), with_pip=True)
        python = Path(scratch, 'env', 'bin', 'python')
        environ = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        for command in (
            [python, '-m', 'pip', 'install', '-qq', wheel],
            [python, '-m', 'pip', 'check'],
            [python, '-c', TRY_INSTALLED, *data_files],
        ):
            subprocess.run(command, cwd=scratch, env=environ, check=True)


def main(directory: Path) -> None:
    """Check the one wheel and the one sdist of a directory."""
    wheel, sdist = only(directory, '*.whl'), only(directory, '*.tar.gz')
    try_installed(wheel.resolve(), check_contents(wheel, sdist))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
