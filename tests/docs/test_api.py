# SPDX-License-Identifier: ZPL-2.1
"""The API page names what exists, and everything that users can import by a public path."""

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / 'docs' / 'api.rst'

PUBLIC_MODULES = [
    f'pyams_zmq.{name}'
    for name in (
        'aio client curve device endpoint exceptions handler include interfaces message pool '
        'process socket stream supervisor testing transaction'
    ).split()
]
# Pyramid calls the first; the others are used by modules of the same package.
UNDOCUMENTED = {'includeme', 'Connection', 'Channel'}


def documented():
    """Return the documented names of each module of the page."""
    names = {}
    for directive, argument, options in re.findall(
        r'^\.\. auto(\w+):: (\S+)\n((?:   .*\n)*)', PAGE.read_text(encoding='utf-8'), re.MULTILINE
    ):
        if directive == 'module':
            members = re.search(r'^   :members:(.*(?:\n    .*)*)', options, re.MULTILINE)
            listed = set() if members is None else set(re.findall(r'\w+', members[1]))
            if members is not None and not listed:
                listed = defined_in(argument)
            names.setdefault(argument, set()).update(listed)
        else:
            module, _, name = argument.rpartition('.')
            names.setdefault(module, set()).add(name)
    return names


def defined_in(name):
    """Return the public classes and functions that a module defines."""
    return {
        key
        for key, value in vars(import_module(name)).items()
        if not key.startswith('_') and getattr(value, '__module__', None) == name
    }


def test_documented_names_exist():
    missing = {
        f'{module}.{name}'
        for module, names in documented().items()
        for name in names
        if not hasattr(import_module(module), name)
    }
    assert missing == set()


@pytest.mark.parametrize('name', PUBLIC_MODULES)
def test_public_names_are_documented(name):
    module = import_module(name)
    public = set(getattr(module, '__all__', ())) | defined_in(name)
    assert all(hasattr(module, key) for key in public)
    assert public - UNDOCUMENTED - set().union(*documented().values()) == set()
