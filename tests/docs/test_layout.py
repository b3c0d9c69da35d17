# SPDX-License-Identifier: ZPL-2.1
"""The layout of the package: imports point down, every file begins with its licence."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from importlib import import_module
from itertools import product
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / 'src' / 'pyams_zmq'
LICENCE = '# SPDX-License-Identifier: ZPL-2.1'

# A package or module imports from its own line and from the lines above it.
LEVELS = (
    ('pyams_zmq', 'interfaces', 'exceptions'),
    ('wire', 'auth'),
    ('process', 'handler', 'client', 'device', 'aio'),
    ('supervisor', 'pool', 'jobs', 'outbox'),
    ('config', 'monitor', 'cli', 'testing', 'include', '__main__'),
    # Only users import these: each re-exports public names of a module inside.
    (
        *('socket', 'endpoint', 'message', 'curve', 'transaction', 'stream'),
        *('health', 'logs', 'metrics', 'otel'),
    ),
)
INDEPENDENT = ('client', 'process', 'aio')
# Data and policy that both clients share; the function that Pyramid calls by its name.
ALLOWED = {
    *(
        ('aio', f'client.{name}')
        for name in 'breaker connection job_info job_request job_watch'.split()
    ),
    ('pyams_zmq', 'include'),
}


def name_of(path):
    """Return the name of a module inside the package, 'pyams_zmq' for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts) or 'pyams_zmq'


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob('*.py'))}


@cache
def parse(name):
    return ast.parse(MODULES[name].read_text(encoding='utf-8'))


def find_module(dotted):
    """Return the module that a dotted name is, or is defined in; None if it is not ours."""
    package, _, name = dotted.partition('.')
    if package != 'pyams_zmq':
        return None
    while name and name not in MODULES:
        name = name.rpartition('.')[0]
    return name or 'pyams_zmq'


@cache
def imports_of(name):
    """Return the modules of this package that a module imports, those in functions included."""
    found = set()
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            found |= {find_module(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{name}: write imports with the name of the package'
            found |= {find_module(f'{node.module}.{alias.name}') for alias in node.names}
    return found - {None, name}


def package_of(name):
    return name.partition('.')[0]


def level_of(name):
    """Return the number of the level that lists the package of a module."""
    [level] = [number for number, names in enumerate(LEVELS) if package_of(name) in names]
    return level


ARROWS = [(name, target) for name in MODULES for target in sorted(imports_of(name))]


def is_allowed(name, target):
    return (package_of(name), target) in ALLOWED


def test_each_package_has_a_level():
    names = [name for level in LEVELS for name in level]
    assert sorted(names) == sorted({package_of(name) for name in MODULES})


def test_imports_point_down():
    upward = [
        f'{name} -> {target}'
        for name, target in ARROWS
        if level_of(target) > level_of(name) and not is_allowed(name, target)
    ]
    assert upward == []


def test_nothing_inside_imports_the_public_modules():
    assert [arrow for arrow in ARROWS if package_of(arrow[1]) in LEVELS[-1]] == []


def test_private_names_stay_in_their_modules():
    found = [
        f'{name}: {node.module}.{alias.name}'
        for name in MODULES
        for node in ast.walk(parse(name))
        if isinstance(node, ast.ImportFrom) and find_module(node.module) is not None
        for alias in node.names
        if alias.name.startswith('_') and alias.name != '_'  # which translates
    ]
    assert found == []


def test_clients_and_process_are_independent():
    pairs = set(product(INDEPENDENT, repeat=2)) - {(name, name) for name in INDEPENDENT}
    found = [
        f'{name} -> {target}'
        for name, target in ARROWS
        if (package_of(name), package_of(target)) in pairs and not is_allowed(name, target)
    ]
    assert found == []


@pytest.mark.parametrize('unit', [str, package_of], ids=['modules', 'packages'])
def test_imports_have_no_cycle(unit):
    graph = {}
    for name, target in ARROWS:
        if unit(name) != unit(target) and (name, target) != ('pyams_zmq', 'include'):
            graph.setdefault(unit(name), set()).add(unit(target))
    TopologicalSorter(graph).prepare()  # raises CycleError, which lists the cycle


def test_files_begin_with_the_licence_and_a_docstring():
    others = [
        name
        for name, path in MODULES.items()
        if not path.read_text(encoding='utf-8').startswith(f'{LICENCE}\n"""')
    ]
    assert others == []


def test_threads_override_only_public_methods_of_thread():
    """A private name that threading uses for itself breaks the thread, some only at a fork."""
    for name in MODULES:
        if name != '__main__':
            import_module('pyams_zmq' if name == 'pyams_zmq' else f'pyams_zmq.{name}')
    taken = {name for name in dir(Thread()) if name.startswith('_') and not name.endswith('__')}
    classes = [each for each in Thread.__subclasses__() if each.__module__.startswith('pyams_zmq.')]
    assert classes
    assert [each for each in classes if taken & vars(each).keys()] == []
