# SPDX-License-Identifier: ZPL-2.1
"""A clock that is set while jobs wait and run, or while there is no service."""

import os
import signal

import pytest

from checks import TIMEOUT, wait_until
from job_checks import Asker, lines_of

HOUR = 3600


@pytest.fixture
def set_clock(tmp_path):
    """Set the clock of services."""

    def set_clock(seconds):
        new = tmp_path / 'new shift'
        new.write_text(str(seconds))
        new.replace(tmp_path / 'shift')

    set_clock(0)
    return set_clock


@pytest.fixture
def serve(tmp_path, address, run_program):
    """Start a service whose clock can be set, in a program."""
    journal, shift = tmp_path / 'x.jobs', tmp_path / 'shift'
    return lambda: run_program('-m', 'clock_service', address, str(journal), str(shift))


@pytest.mark.parametrize('shift', [-HOUR, HOUR])
def test_clock_is_set(serve, set_clock, address, tmp_path, shift):
    """All jobs run, those with a delay in time, and what runs goes on under the next broker."""
    program = serve()
    hold, log = tmp_path / 'hold', tmp_path / 'jobs.log'
    hold.touch()
    with Asker(address) as asker:
        asker.submit('work', {'path': str(hold), 'log': str(log)}, id='long')
        lines_of(log)
        asker.submit('add', [1], id='delayed', delay=1.5)
        asker.submit('add', [2], id='waiting', expires=2 * HOUR)
        set_clock(shift)
        asker.submit('add', [3], id='later', delay=0.1)
        pid = asker.ask('pyams_zmq.stats')[1]['pid']
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: asker.ask('pyams_zmq.stats')[1]['pid'] != pid, TIMEOUT)
        asker.wait('long', until=lambda job: job['progress'])
        hold.unlink()
        jobs = [asker.wait(job_id) for job_id in ('long', 'delayed', 'waiting', 'later')]
        assert {job['state'] for job in jobs} == {'done'}
        assert asker.run('add', [4])['reply'] == [200, 4]
    assert len(lines_of(log)) == 1
    program.send_signal(signal.SIGTERM)
    assert program.wait(TIMEOUT) == 0


def test_clock_is_set_back_while_there_is_no_service(serve, set_clock, address):
    program = serve()
    with Asker(address) as asker:
        asker.submit('add', [1], id='delayed', delay=1.5)
        program.send_signal(signal.SIGTERM)
        assert program.wait(TIMEOUT) == 0
        set_clock(-HOUR)
        serve()
        assert asker.wait('delayed')['reply'] == [200, 1]
