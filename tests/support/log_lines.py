# SPDX-License-Identifier: ZPL-2.1
"""The log of all processes of a test in one file, each record as a line of JSON."""

import json
import logging
from contextlib import contextmanager

from checks import wait_until

FIELDS = ('service', 'method', 'job', 'error_id', 'trace_id')


class JSONFormatter(logging.Formatter):
    """Formats a record as the JSON of its message and of the fields that it has."""

    def format(self, record):
        fields = {name: vars(record)[name] for name in FIELDS if name in vars(record)}
        return json.dumps({'text': record.getMessage(), 'level': record.levelname, **fields})


class LogLines:
    """The records of a file."""

    def __init__(self, path):
        self.path = path

    def read(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def find(self, text):
        """Wait for the first record with a text; return its fields."""
        record = wait_until(lambda: next((r for r in self.read() if text in r['text']), None))
        return {name: record[name] for name in FIELDS if name in record}


@contextmanager
def log_lines(path, *filters):
    """Write the log of this process, and of those that it forks, to a file.

    :param filters: filters of the handler
    """
    handler = logging.FileHandler(path)
    handler.setFormatter(JSONFormatter())
    for each in filters:
        handler.addFilter(each)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield LogLines(path)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
