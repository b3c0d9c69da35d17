# SPDX-License-Identifier: ZPL-2.1
"""The words of a command line: arguments that are not options, before, between and after these."""

import os
import re
from argparse import Action, ArgumentParser
from collections.abc import Iterable
from typing import Any

_VARIABLE = re.compile(r'[^\W\d][\w.-]*=')  # no JSON value begins like this
_NUMBER = re.compile(r'-\d')


_PATHS = ('INI', 'INI NAME', 'FILE', 'KEY', 'DIR')
"""What arguments are called whose values are files, or folders"""

_COMPLETE_FILES = {
    'bash': '_shtab_compgen_files',
    'zsh': '_files',
    'tcsh': 'f',
    'fish': '(__fish_complete_path (commandline -ct))',
    'powershell': '_shtab_powershell_compgen_files',
}
"""The value of `shtab.FILE`: how the scripts that shtab writes complete the name of a file"""


class CommandParser(ArgumentParser):
    """Parser of a command whose words may stand between its options.

    If the command has an argument `words` with ``nargs='*'``, argparse would take the words before
    the first option only.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Action:
        """Add an argument; the shell completes its value, if that is the path of a file."""
        action = super().add_argument(*args, **kwargs)
        if action.metavar in _PATHS:
            action.complete = _COMPLETE_FILES  # type: ignore[attr-defined] # shtab reads it
        return action

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; return a namespace, and the arguments that are not known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if not hasattr(namespace, 'words'):
            return namespace, rest
        unknown: list[str] = []
        for number, each in enumerate(rest):
            if each == '--':  # only words follow
                namespace.words += rest[number + 1 :]
                break
            is_word = each == '-' or each[:1] != '-' or _NUMBER.match(each)
            (namespace.words if is_word else unknown).append(each)
        return namespace, unknown


def split_variables(words: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Return the words without those of the form VARIABLE=VALUE, and the values by variable."""
    plain: list[str] = []
    variables: dict[str, str] = {}
    for word in words:
        if _VARIABLE.match(word):
            name, _equals, value = word.partition('=')
            variables[name] = value
        else:
            plain.append(word)
    return plain, variables


def decode_word(word: str) -> str:
    """Return a word that a service gets: UTF-8, also where the system has another encoding.

    :raises ValueError: if it is not UTF-8
    """
    try:
        word.encode()
    except UnicodeEncodeError:  # bytes that Python could not decode
        return os.fsencode(word).decode()
    return word
