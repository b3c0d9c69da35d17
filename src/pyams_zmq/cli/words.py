# SPDX-License-Identifier: ZPL-2.1
"""The words of a command line: arguments that are not options, before, between and after these."""

import re
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any

_VARIABLE = re.compile(r'[^\W\d][\w.-]*=')  # no JSON value begins like this
_NUMBER = re.compile(r'-\d')


class CommandParser(ArgumentParser):
    """Parser of a command whose words may stand between its options.

    If the command has an argument `words` with ``nargs='*'``, argparse would take the words before
    the first option only.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; return a namespace, and the arguments that are not known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if not hasattr(namespace, 'words'):
            return namespace, rest
        words = [each for each in rest if each == '-' or each[:1] != '-' or _NUMBER.match(each)]
        namespace.words = [*namespace.words, *words]
        return namespace, [each for each in rest if each not in words]


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
