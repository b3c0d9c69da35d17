# SPDX-License-Identifier: ZPL-2.1
"""Loads the application that an ini file configures."""

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from pyramid.paster import bootstrap, setup_logging
from pyramid.threadlocal import manager

from pyams_zmq.cli.output import accept_any_record


def load_application(
    parser: ArgumentParser,
    config_uri: str,
    variables: Mapping[str, str] | None = None,
    *,
    logs: bool = True,
) -> Any:
    """Load an application, set up its logging, and return its registry.

    :param parser: parser of the command; it ends the program if the file does not exist
    :param config_uri: path of the ini file, or another URI that :mod:`plaster` can load
    :param variables: values of the variables in the ini file
    :param logs: False for a command that asks: it does not write to the logs of the application,
        and what modules print while they are imported does not get into its data
    """
    path = config_uri.partition('#')[0]
    if ':' not in path and not Path(path).is_file():
        parser.error(f'file {path} does not exist')
    if logs:
        setup_logging(config_uri, variables)
        accept_any_record()
    output = nullcontext() if logs else redirect_stdout(sys.stderr)
    # What the application opens for a request, such as a database, is closed before the fork.
    with output, bootstrap(config_uri, options=variables) as env:
        registry = env['registry']
    manager.push({'registry': registry, 'request': None})
    return registry
