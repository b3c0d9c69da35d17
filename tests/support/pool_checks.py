# SPDX-License-Identifier: ZPL-2.1
"""Helpers of the tests of pools: clients, waiting, kills."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from functools import partial

import psutil

from app.program import wait_for_end
from checks import TIMEOUT, wait_until
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import (
    ZMQBaseError,
    ZMQTimeoutError,
)


@contextmanager
def client_of(pool, **options):
    with ZMQClient(pool.bound_address, timeout=TIMEOUT, **options) as client:
        yield client


@contextmanager
def in_threads(function, *arguments):
    """Call a function in threads, once for each argument; yield the list of results."""
    results = []

    def call(argument):
        try:
            results.append(function(argument))
        except ZMQBaseError as error:
            results.append(error)

    threads = [threading.Thread(target=call, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    try:
        yield results
    finally:
        for thread in threads:
            thread.join(TIMEOUT)


def workers_of(pool):
    """Return the pids of the workers that are registered at the broker."""
    return {worker['pid'] for worker in pool.stats()['workers']}


def ports_of(pool):
    """Return the remote ports of the connections of clients that the broker has not closed."""
    broker = psutil.Process(pool.stats()['pid'])
    port = int(pool.bound_address.rpartition(':')[2])
    return {
        each.raddr.port
        for each in broker.net_connections('tcp')
        if each.laddr.port == port and each.raddr
    }


def wait_for_workers(pool, but=(), count=2):
    """Wait until *count* workers are registered, none of *but*; return their pids."""

    def look():
        try:
            workers = workers_of(pool)
        except ZMQTimeoutError:  # the broker is being replaced
            return None
        return workers if len(workers) == count and not workers & set(but) else None

    return wait_until(look, TIMEOUT)


def wait_for_queue(pool, length):
    """Wait until *length* calls wait."""

    def look():
        try:
            return pool.stats()['queue'] == length
        except ZMQTimeoutError:  # the broker is being replaced
            return False

    wait_until(look, TIMEOUT)


def wait_for_file(path):
    wait_until(path.exists, TIMEOUT)


def wait_for_files(folder, pattern, count):
    return wait_until(
        lambda: files if len(files := list(folder.glob(pattern))) == count else None, TIMEOUT
    )


@contextmanager
def held_calls(client, folder, count=1):
    """Let workers hold calls during the block; yield their pids, and the list of results."""
    hold = folder / 'hold'
    hold.touch()
    with in_threads(partial(client.call, 'wait_again'), *[str(hold)] * count) as results:
        try:
            paths = wait_for_files(folder, 'hold.*', count)
            yield {int(path.suffix[1:]) for path in paths}, results
        finally:
            hold.unlink()


def ask_who_waits(client, path):
    return client.call('wait_for', str(path))


def kill_workers(process, kills, calls):
    """Kill workers while clients call; return the replies and the seconds of each replacement."""
    numbers = iter(range(calls))
    lock = threading.Lock()
    replies, times, done = [], [], []

    def call(client):
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            reply = client.call('again', number)
            done.append(number)
            replies.append((number, reply[1]))

    with client_of(process) as client, in_threads(call, *[client] * 4) as results:
        for number in range(kills):
            wait_until(lambda number=number: len(done) >= number * calls // kills, 60)
            workers = workers_of(process)
            pid = sorted(workers)[number % 2]
            start = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            wait_for_workers(process, {pid})
            times.append(time.monotonic() - start)
    assert results == [None] * 4
    return replies, times


OWNER = """
import json, os, sys
from pool_handlers import Pool
pool = Pool()
pool.start()
pool.wait_ready()
stats = pool.stats()
pids = [pool.pid, stats['pid'], *[each['pid'] for each in stats['workers']]]
os.write(1, (json.dumps(pids) + '\\n').encode())
sys.stdin.readline()
"""


def wait_for_ends(pids):
    for pid in pids:
        wait_for_end(pid, 10)
