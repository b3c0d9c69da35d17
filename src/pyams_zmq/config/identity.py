# SPDX-License-Identifier: ZPL-2.1
"""The identity of an application: its name, its ini file, or its package and settings."""

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path, PurePath
from types import FrameType
from typing import Any, NamedTuple

APPLICATION = 'pyams_zmq.application'
"""Setting with the name of the application"""

_VALUES = (str, bytes, int, float, type(None), PurePath, Decimal, date, timedelta)

_SECTION = re.compile(r'\[(.+)\]')

_LOADER = re.compile(r'(paste|plaster\w*|pyramid)(\.|$)', re.ASCII)


class Application(NamedTuple):
    """An application, the same one in all its workers.

    :ivar name: text that no other application has; without a secret
    :ivar description: what a user knows it by
    :ivar ini: its ini file, with the section if that is not `main`; empty if it is not known
    """

    name: str
    description: str
    ini: str = ''


class Ini(NamedTuple):
    """The ini file of an application.

    :ivar path: its absolute path; a symbolic link stays one
    :ivar section: name of the application in it, None if it is unknown
    """

    path: str
    section: str | None

    @property
    def folder(self) -> str:
        """Folder of the file."""
        return os.path.dirname(self.path)

    def locate(self, key: str) -> 'Ini':
        """Return the place of a setting: it may be in the section of a pipeline's application."""
        sections, section = [], self.section
        with suppress(OSError, ValueError):  # another loader has read something else
            for line in Path(self.path).read_text(encoding='utf-8').splitlines():
                if header := _SECTION.match(line):
                    section = header[1].rpartition(':')[2].strip()
                elif line.startswith(key) and line[len(key) :].lstrip()[:1] in ('=', ':'):
                    sections.append(section)
        is_elsewhere = sections and self.section not in sections
        return self._replace(section=sections[0]) if is_elsewhere else self

    def __str__(self) -> str:
        return self.path if self.section is None else f'{self.path}, section {self.section}'


def identify(registry: Any) -> Application:
    """Return the application that is being made in this thread, or was made without an ini file.

    The setting `pyams_zmq.application` identifies it, else its ini file and the section there.
    Without these its package does, with the place of the package and the settings. A path counts as
    it is given: a symbolic link to the current release stays the same.

    :param registry: registry of the application
    """
    settings = registry.settings or {}
    given = settings.get(APPLICATION)
    place = find_ini()
    ini = ''
    if place is not None:
        ini = place.path if place.section in (None, 'main') else f'{place.path}#{place.section}'
    if given:
        return Application(f'application {given}', str(given), ini)
    package = registry.__name__
    if place is not None:
        return Application(f'{package} {place}', f'{package} ({place})', ini)
    module = sys.modules.get(package)
    folder = os.path.abspath(getattr(module, '__file__', None) or '')
    digest = hashlib.sha256(_text_of(settings).encode(errors='surrogatepass')).hexdigest()
    return Application(f'{package} {folder} {digest}', f'{package} ({folder})')


def find_ini() -> Ini | None:
    """Return the ini file of the application that is being made in this thread, if it is known.

    The application factory gets the file, PasteDeploy has the name, and Pyramid keeps neither: look
    at the callers. Only what loads an ini file, and what that calls, knows it; other programs may
    use the same names for something else.
    """
    path = name = None
    for frame in _frames():
        variables = frame.f_locals
        for value in list(variables.values()) if _is_loader(frame, frame.f_back) else ():
            if path is None and type(value) is dict and '__file__' in value and 'here' in value:
                path = value['__file__']
        if frame.f_globals.get('__name__') == 'paste.deploy.loadwsgi' and 'name' in variables:
            name = name or variables['name'] or variables.get('uri', '').partition('#')[2] or 'main'
    return None if path is None else Ini(os.path.abspath(path), name)


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_loader(*frames: FrameType | None) -> bool:
    """Return True if one of the frames belongs to PasteDeploy, plaster or Pyramid."""
    return any(
        frame is not None and _LOADER.match(frame.f_globals.get('__name__') or '')
        for frame in frames
    )


def _text_of(value: Any, containers: tuple[Any, ...] = ()) -> str:
    """Return a text of a value, the same one in all workers.

    Values and containers count by what they contain, other objects by their class: they may differ
    from worker to worker.

    :param containers: those that contain the value
    """
    if isinstance(value, _VALUES):
        return repr(value)
    kind = type(value).__qualname__
    if any(value is container for container in containers):
        return kind  # it contains itself
    containers = (*containers, value)
    if isinstance(value, dict):
        items = [
            f'{_text_of(key, containers)}: {_text_of(item, containers)}'
            for key, item in value.items()
        ]
        return f'{{{", ".join(sorted(items))}}}'
    if isinstance(value, (list, tuple)):
        return f'[{", ".join(_text_of(item, containers) for item in value)}]'
    if isinstance(value, (set, frozenset)):
        return f'{{{", ".join(sorted(_text_of(item, containers) for item in value))}}}'
    return kind
