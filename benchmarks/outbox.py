# SPDX-License-Identifier: ZPL-2.1
"""What a message in the outbox adds to a commit, with PostgreSQL, sqlite and a FileStorage.

In turns, it commits transactions with one row of the application, with a row and a message that is
sent on commit without an outbox, and with a row and a message in the outbox. A service receives the
messages, and their entries are dropped, while that runs. It prints the median of the times of a
commit, and the ratios. Between two commits there is a pause, as between the requests of a server.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import transaction

SUPPORT = Path(__file__).resolve().parents[1] / 'tests' / 'support'
sys.path.insert(0, str(SUPPORT))

from outbox_databases import make_outbox, open_database, remove_lock  # noqa: E402 - of the tests
from postgresql import run_postgresql  # noqa: E402 - of the tests
from pyams_zmq.client import ZMQClient  # noqa: E402 - as all imports, after those of the tests
from pyams_zmq.client.transaction import send_on_commit  # noqa: E402 - as above
from pyams_zmq.outbox.sender import OutboxSender  # noqa: E402 - as above
from pyams_zmq.process import ZMQProcess  # noqa: E402 - as above
from pyams_zmq.testing import running  # noqa: E402 - as above

KINDS = ('sqlite', 'postgresql', 'file')
WAYS = ('no message', 'no outbox', 'outbox')
BLOCK = 20
"""Commits of one way before those of the next one"""

MESSAGE = {'path': '/this/is/my/path/of/a/clip.mov', 'format': 'JPEG'}

write = sys.stdout.write


class Sink:
    """Receives the messages."""

    def convert(self, args):
        """Do nothing."""
        return [200, None]


@contextmanager
def make_database(kind, folder):
    """Make and open a database, see `open_database`."""
    with ExitStack() as stack:
        url = f'sqlite:///{folder}/data.sqlite'
        if kind == 'postgresql':
            url = stack.enter_context(run_postgresql()).make_database()
        elif kind == 'file':
            url = f'file:{folder}/data.fs'
        yield stack.enter_context(open_database(url, 'web'))


def commit(database, manager, name, sender):
    """Commit a row, with a message if there is a sender; return the seconds that it took."""
    start = perf_counter()
    manager.begin()
    request = database.make_request(manager)
    database.add(request, name)
    if sender is not None:
        send_on_commit(sender(request), 'convert', MESSAGE, manager=manager)
    manager.commit()
    return perf_counter() - start


def measure(kind, blocks, pause):
    """Return the seconds of each commit, by way.

    :param blocks: number of blocks of each way
    :param pause: seconds between two commits
    """
    times = {way: [] for way in WAYS}
    names = map('clip {}'.format, count())
    manager = transaction.TransactionManager()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='b-')))
        service = stack.enter_context(running(ZMQProcess, f'ipc://{folder}/zmq.sock', Sink))
        client = stack.enter_context(ZMQClient(service.bound_address))
        database = stack.enter_context(make_database(kind, folder))
        outbox = make_outbox(kind, database.storage, lambda _name: client)
        stack.callback(remove_lock, kind)
        stack.callback(outbox.close)
        senders = (
            None,
            lambda _request: client,
            lambda request: OutboxSender(outbox, 'sink', client, request),
        )
        for block in range(-1, blocks):
            for way, sender in zip(WAYS, senders, strict=True):
                for _turn in range(BLOCK):
                    seconds = commit(database, manager, next(names), sender)
                    if block >= 0:  # the first one warms up
                        times[way].append(seconds)
                    sleep(pause)
    return times


def main(argv=None):
    """Run the program.

    :param argv: arguments, by default those of the command line
    """
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('kinds', nargs='*', help=f'{", ".join(KINDS)}; by default all')
    parser.add_argument('--commits', type=int, default=1000, help='of each way (1000)')
    parser.add_argument('--pause', type=float, default=0.005, help='seconds between two (0.005)')
    args = parser.parse_args(argv)
    for kind in args.kinds or KINDS:
        times = measure(kind, max(1, args.commits // BLOCK), args.pause)
        medians = {way: median(found) for way, found in times.items()}
        base = medians['no message']
        texts = [f'{way} {each * 1000:.2f} ms ({each / base:.2f})' for way, each in medians.items()]
        write(f'{kind}: {", ".join(texts)}\n')


if __name__ == '__main__':
    main()
