#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#


"""Settings of gunicorn: it notes its workers, which lose the signals they get while they boot."""

from pathlib import Path

timeout = 8  # seconds; workers look for their master twice in that time


def post_worker_init(worker):
    """Note the pid of a worker which serves; runs in the worker."""
    with Path('workers').open('a', encoding='ascii') as file:
        file.write(f'{worker.pid}\n')
