# SPDX-License-Identifier: ZPL-2.1
"""The journal of jobs, without a broker.

It measures the time until a submitted job is on disk, beside the bare fdatasync of as many bytes;
jobs accepted, and run to their ends, per second with 16 submitters; and with 100,000 ended jobs the
time of a page of a list, of a step that removes old jobs, and of the start. It also prints how long
the write-ahead log became, and by how much the memory grew.
"""

import argparse
import asyncio
import os
import resource
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from uuid import uuid4

from pyams_zmq.jobs.journal import Journal
from pyams_zmq.jobs.records import Submission
from pyams_zmq.jobs.writer import JournalWriter

FRAMES = [b'', b'["convert", {"path": "/this/is/my/path/of/a/clip.mov", "format": "JPEG"}]']
REPLY = b'[200, "/this/is/my/path/of/a/clip.mov.webm"]'
PAGE = 4096  # bytes

write = sys.stdout.write


def make_job():
    """Return a job with a random id, as clients make it."""
    return Submission(id=str(uuid4()), type='convert', frames=FRAMES, user='alice')


def report(name, values):
    """Print seconds as milliseconds."""
    cuts = quantiles(values, n=100)
    write(
        f'{name}: p50 {median(values) * 1000:.2f} ms, p99 {cuts[98] * 1000:.2f}, '
        f'longest {max(values) * 1000:.2f}, of {len(values)}\n'
    )


@contextmanager
def writing(path):
    """Open a journal and its writer; close them."""
    journal = Journal(str(path))
    writer = JournalWriter(journal, asyncio.get_running_loop().call_soon_threadsafe)
    try:
        yield journal, writer
    finally:
        writer.close()
        journal.close()


async def wait_for(method, *args, **kwargs):
    """Call a method of the writer, and wait for its outcome."""
    future = asyncio.get_running_loop().create_future()
    method(*args, callback=future.set_result, **kwargs)
    outcome = await future
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def size_of(path):
    """Return the bytes of a file."""
    return path.stat().st_size


def measure_disk(path, pages, count):
    """Write some pages, and wait for the disk, as often as given."""
    values = []
    with path.open('wb', buffering=0) as file:
        file.write(bytes(PAGE * pages))
        os.fsync(file.fileno())
        for _ in range(count):
            file.seek(0)
            start = perf_counter()
            file.write(bytes(PAGE * pages))
            os.fdatasync(file.fileno())
            values.append(perf_counter() - start)
    return values


async def measure_alone(folder, count):
    """Accept one job after the other; between them, wait for the disk without a journal."""
    bare, values = [], []
    with writing(folder / 'alone') as (_journal, writer):
        for _ in range(count // 10):
            bare += measure_disk(folder / 'bare', 8, 10)
            for _ in range(10):
                start = perf_counter()
                await wait_for(writer.accept, make_job())
                values.append(perf_counter() - start)
    report('fdatasync of 8 pages', bare)
    report('accepted alone', values)
    goal = 2 * median(bare) + 0.001
    write(f'  goal: p50 at most {goal * 1000:.2f} ms\n')


async def measure_many(folder, count, clients):
    """Accept jobs for some submitters, then run them all."""
    path, wal = folder / 'many', folder / 'many-wal'
    longest = 0
    values = []

    async def submit():
        nonlocal longest
        for _ in range(count // clients):
            start = perf_counter()
            await wait_for(writer.accept, make_job())
            values.append(perf_counter() - start)
            longest = max(longest, size_of(wal))

    async def work():
        nonlocal longest
        while jobs := (await wait_for(writer.claim, 1, ['convert'])).jobs:
            await wait_for(writer.end, jobs[0].number, jobs[0].attempt, 'done', REPLY)
            longest = max(longest, size_of(wal))

    with writing(path) as (_journal, writer):
        start = perf_counter()
        await asyncio.gather(*(submit() for _ in range(clients)))
        write(f'accepted with {clients} submitters: {count / (perf_counter() - start):.0f}/s\n')
        report('  each', values)
        start = perf_counter()
        await asyncio.gather(*(work() for _ in range(clients)))
        write(f'to the end with {clients} workers: {count / (perf_counter() - start):.0f}/s\n')
    write(f'longest write-ahead log: {longest / 2**20:.1f} MiB\n')


def fill(path, count):
    """Make ended jobs, which are an hour old."""
    journal = Journal(str(path))
    now = journal.reader.last_time() or 1e9
    for _ in range(count // 1000):
        with journal.transaction(now, is_durable=False) as jobs:
            for _ in range(1000):
                jobs.accept(make_job())
            for index, job in enumerate(jobs.claim(1000, ['convert']).jobs):
                state = 'failed' if index % 100 == 0 else 'done'
                jobs.end(job.number, job.attempt, state, REPLY)
        journal.checkpoint()
    journal.close()


def measure_old(folder, count):
    """Read and remove old jobs."""
    path = folder / 'old'
    start = perf_counter()
    fill(path, count)
    write(
        f'{count} ended jobs in {perf_counter() - start:.1f} s, {path.stat().st_size >> 20} MiB\n'
    )
    start = perf_counter()
    journal = Journal(str(path))
    write(f'start: {(perf_counter() - start) * 1000:.0f} ms\n')
    pages = []
    for state, kind in (
        *((None, None), ('done', None), ('failed', None)),
        *((None, 'convert'), ('failed', 'convert'), ('waiting', None), (None, 'none')),
    ):
        before = None
        for _ in range(50):
            start = perf_counter()
            found = journal.reader.page(state, kind, before=before)
            pages.append(perf_counter() - start)
            before = found[-1].id if found else None
    report('page of 100 jobs', pages)
    steps, checkpoints, has_more = [], [], True
    while has_more:
        start = perf_counter()
        _expired, has_more = journal.tidy(2e9)
        steps.append(perf_counter() - start)
        start = perf_counter()
        journal.checkpoint()
        checkpoints.append(perf_counter() - start)
    report('step that removes jobs, or gives pages back', steps)
    report('checkpoint after it', checkpoints)
    write(f'left: {sum(journal.counts.states.values())} jobs, ')
    journal.close()
    write(f'{path.stat().st_size >> 20} MiB\n')


async def measure_memory(folder, count):
    """Accept jobs that nothing runs."""
    with writing(folder / 'waiting') as (_journal, writer):
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(count // 500):
            await asyncio.gather(*(wait_for(writer.accept, make_job()) for _ in range(500)))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    write(f'memory for {count} jobs that wait: {grown / 1024:+.1f} MiB\n')


def main():
    """Run all measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--folder', help='a folder on the disk to measure')
    parser.add_argument('--jobs', type=int, default=5000)
    parser.add_argument('--ended', type=int, default=100_000)
    parser.add_argument('--clients', type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        asyncio.run(measure_memory(folder, arguments.ended))
        asyncio.run(measure_alone(folder, min(1000, arguments.jobs)))
        asyncio.run(measure_many(folder, arguments.jobs, arguments.clients))
        measure_old(folder, arguments.ended)


if __name__ == '__main__':
    main()
