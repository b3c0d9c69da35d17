# SPDX-License-Identifier: ZPL-2.1
"""The API page documents every public module and every name in ``__all__``; all its names exist."""

import re
from importlib import import_module
from pathlib import Path

PAGE = Path(__file__).parents[2] / 'docs' / 'api.rst'

PUBLIC_MODULES = [
    f'pyams_zmq.{name}'
    for name in (
        'aio auth client client.jobs config curve device endpoint exceptions handler health '
        'include interfaces jobs logs message metrics otel outbox outbox.sqlalchemy pool process '
        'socket stream supervisor testing transaction'
    ).split()
]


# Its `__all__` also exports what the packages of this distribution import.
SHARED_MODULE = 'pyams_zmq.auth'


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


def test_exactly_the_public_modules_are_documented():
    assert set(documented()) == set(PUBLIC_MODULES)


def test_all_is_documented():
    names = set().union(*documented().values())
    exported = [
        (name, key)
        for name in PUBLIC_MODULES
        if name != SHARED_MODULE
        for key in getattr(import_module(name), '__all__', ())
    ]
    assert [(name, key) for name, key in exported if not hasattr(import_module(name), key)] == []
    assert [(name, key) for name, key in exported if key not in names] == []
