# SPDX-License-Identifier: ZPL-2.1
"""Errors of the configuration: they name the setting and its ini file, or the directive."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from pyramid.config.actions import ActionInfo
from pyramid.exceptions import ConfigurationError

from pyams_zmq.config.identity import find_ini
from pyams_zmq.config.options import OPTIONS, PREFIX


class SettingsInfo(ActionInfo):  # type: ignore[misc] # Pyramid has no types
    """Place of what settings declare; Pyramid shows it in errors, as it shows lines of code."""

    def __init__(self) -> None:
        super().__init__(find_ini(), 0, '', '')

    def __str__(self) -> str:
        return f'settings of {self.file or "the application"}'


@contextmanager
def as_settings(config: Any) -> Iterator[None]:
    """Let errors of the actions that are added name the settings as their place."""
    former, config.info = config.info, SettingsInfo()
    try:
        yield
    finally:
        config.info = former


def locate(setting: str) -> str:
    """Return the name of a setting, and its ini file and section if they are known."""
    ini = find_ini()
    if ini is None:
        return setting
    name = setting.strip("'")  # it may be quoted
    return f'{setting} in {ini.locate(name)}'


def is_set(settings: Mapping[str, Any], setting: str) -> bool:
    """Return True if a setting has a value."""
    return settings.get(setting) not in (None, '')


def describe_source(settings: Mapping[str, Any], name: str, key: str) -> str:
    """Return where the value of an option comes from.

    :param settings: settings of the application
    :param name: name of the service
    :param key: name of the option
    """
    setting = f'{PREFIX}{name}.{key}'
    if is_set(settings, setting):
        return f'setting {locate(setting)}'
    return f'option of add_zmq_process; setting {setting} overrides it'


@contextmanager
def named(settings: Mapping[str, Any], name: str, key: str) -> Iterator[None]:
    """Convert an error into a ConfigurationError that names an option, and where it is set."""
    try:
        yield
    except (ValueError, TypeError) as error:
        source = describe_source(settings, name, key)
        raise ConfigurationError(f'ØMQ process {name!r}, bad {key} ({source}): {error}') from None


def suggest(name: str, prefix: str = '') -> str:
    """Return the advice to write the option that is most similar, or one of all.

    :param name: an unknown option
    :param prefix: what comes before the options
    """
    similar = get_close_matches(name.lower(), OPTIONS, 1)
    if similar:
        return f'did you mean {prefix}{similar[0]}?'
    return f'write {prefix}OPTION with one of these: ' + ', '.join(sorted(OPTIONS))
