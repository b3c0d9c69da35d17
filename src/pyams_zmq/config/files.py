# SPDX-License-Identifier: ZPL-2.1
"""The files that options name: an absolute path, an asset, or a path beside the ini file."""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyramid.path import AssetResolver

from pyams_zmq.auth.curve import is_key, is_key_file
from pyams_zmq.config.identity import find_ini

_FORMS = 'write an absolute path, an asset package:path, or a path relative to the ini file'
_DOTTED_NAME = re.compile(r'[A-Za-z_][\w.]*', re.ASCII)


def resolve_path(path: Any, config: Any) -> Path:
    """Return the absolute path of a file.

    :param path: an absolute path; an asset `package:path`, as Pyramid names it, that exists; or a
        path relative to the folder of the ini file, which the setting `here` names if the file is
        unknown
    :param config: configurator of the application
    :raises ValueError: for anything else; its text does not quote what may be a password
    """
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise ValueError(f'A {type(path).__name__} is not a path; {_FORMS}') from None
    if os.path.isabs(text):
        return Path(text)
    package, colon, name = text.partition(':')
    if not colon:
        return _get_folder(config) / text
    if name.startswith('/'):
        raise ValueError(f'Paths do not begin with {package + colon!r}; {_FORMS}')
    return _find_asset(package, name)


def _find_asset(package: str, name: str) -> Path:
    found = None
    if _DOTTED_NAME.fullmatch(package):
        with suppress(Exception):  # of the package, which is imported
            asset = AssetResolver(None).resolve(f'{package}:{name}')
            found = asset.abspath() if asset.exists() else None
    if found is None:
        # Credentials look like an asset: they may have been given instead.
        raise ValueError(f'The package {package!r} or its file was not found; {_FORMS}')
    return Path(found)


def _get_folder(config: Any) -> Path:
    ini = find_ini()
    folder = (config.registry.settings or {}).get('here') if ini is None else ini.folder
    if not folder:
        raise ValueError(f'The path is relative, and no ini file is known; {_FORMS}')
    return Path(folder)


def check_users(users: Any, config: Any) -> Any:
    """Return users as they were given.

    :raises ValueError: for the URI of a file beside the ini file, the path of which would be the
        password of a user `file`; its text does not quote it
    """
    if isinstance(users, str) and users.lower().startswith('file:'):
        path = ''
        with suppress(ValueError):  # no ini file is known
            path = os.path.join(_get_folder(config), users[len('file:') :].strip())
        if os.path.isfile(path):
            raise ValueError(
                "It is a file beside the ini file: name it by auth_file, without 'file:'"
            )
    return users


def resolve_key(key: Any, config: Any) -> Any:
    """Return a key as it was given, or the path of its file."""
    return resolve_path(key, config) if is_key_file(key) else key


def resolve_keys(keys: Any, config: Any) -> Any:
    """Return the path of a folder, or a list of keys.

    :param keys: a folder, or keys separated by blanks, or a sequence of keys
    """
    if isinstance(keys, os.PathLike):
        return resolve_path(keys, config)
    if not isinstance(keys, str):
        return [resolve_key(key, config) for key in keys]
    items = keys.split()
    if items and not (is_key(items[0]) or is_key_file(items[0])):
        text = keys.strip()
        if text.startswith(('/', './', '../')):
            return resolve_path(text, config)
        with suppress(ValueError):  # it is not a path
            folder = resolve_path(text, config)
            if os.path.isdir(folder):
                return folder
    return [resolve_key(key, config) for key in items]
