# SPDX-License-Identifier: ZPL-2.1
"""A program that commits messages: `python outbox_sender.py URL ADDRESS NAME END`.

It commits 20 messages, prints a line, and ends as END says: `return` does it normally, `fork` after
a fork that ends normally, `exit` skips the end of Python, with exit code 3, and `wait` waits for a
signal.
"""

import os
import signal
import sys

from databases import Application
from outbox_sending import Sending


def main(url, address, name, end):
    sending = Sending(Application(url), {'messages': address}, name)
    for number in range(20):
        sending.commit(str(number))
    print('committed', flush=True)
    if end == 'exit':
        os._exit(3)
    if end == 'wait':
        signal.pause()
    if end == 'fork':
        lock = sending.relay._lock
        lock.acquire()  # as another thread may have done
        if pid := os.fork():
            lock.release()
            assert os.waitpid(pid, 0) == (pid, 0)


if __name__ == '__main__':
    main(*sys.argv[1:])
