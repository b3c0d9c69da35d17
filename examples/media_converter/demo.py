# SPDX-License-Identifier: ZPL-2.1
"""Convert clips in a ØMQ service, as a web application does, and let some of it go wrong."""

import argparse
import os
import signal
import sys
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

from clips import ClipError, describe, make_clip
from converter import Converter

from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQBaseError, ZMQRemoteError
from pyams_zmq.pool import ZMQPool


def convert(client, clip, disturb=None):
    """Convert a clip, and print the progress; return the path of the result.

    `disturb` is called with the id of the job, when it has made some progress.
    """
    target_format = 'mp4' if clip.suffix == '.webm' else 'webm'
    job_id = client.submit('convert', {'path': str(clip.absolute()), 'format': target_format}).id
    print('   job', job_id, 'is on disk')
    for job in client.watch(job_id):
        if job.progress is None or job.is_ended:
            print('  ', job.state, f'(attempt {job.attempt})', flush=True)
            continue
        show_progress(job.progress)
        if disturb is not None:
            disturb(job_id)
            disturb = None
    return Path(client.result(job_id))


def show_progress(progress):
    """Print the progress, with a bar if the length of the clip is known."""
    part = progress.fraction
    bar = '' if part is None else f'[{"#" * int(30 * part):30}] {part:4.0%}, '
    print(f'   {bar}{progress.done:.1f} s of the clip', flush=True)


def kill_worker(pool):
    """Kill the worker that runs a job."""
    for worker in pool.stats()['workers']:
        if worker['state'] == 'busy':
            print('   kill -9', worker['pid'])
            os.kill(worker['pid'], signal.SIGKILL)


def show_clip(path):
    """Print the properties of a clip."""
    about = describe(path)
    print(path)
    print(f'   format    {about["format"]} ({", ".join(about["codecs"])}, {about["resolution"]})')
    print(f'   duration  {about["duration"]:.2f} s')
    print(f'   size      {path.stat().st_size} bytes')


def run(clip, spare):
    """Convert a clip; cancel the conversion of a spare one; kill the worker of another."""
    auth = f'demo:{token_hex()}'  # refuse other users of this machine
    pool = ZMQPool('127.0.0.1', Converter, auth=auth, workers=3)
    pool.journal = spare.with_name('converter.jobs')
    pool.start()
    try:
        with ZMQClient(pool.wait_ready(), auth=auth) as client:
            print('The service is ready at', client.address)
            print('\nConvert a clip:')
            try:
                show_clip(convert(client, clip))
            except ZMQRemoteError:
                formats = ', '.join(client.call('formats'))
                print('The service is still running; it converts to', formats)
                raise
            print('\nCancel another one:')
            try:
                convert(client, spare, client.cancel)
            except ZMQRemoteError as error:
                print('  ', error)
            print('\nKill the worker of the next one:')
            show_clip(convert(client, spare, lambda _job_id: kill_worker(pool)))
    finally:
        pool.stop()


def main():
    """Convert the clip that the command line names, or a generated one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('clip', nargs='?', type=Path, help='default: a generated clip')
    clip = parser.parse_args().clip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` does the same as Ctrl-C
    try:
        with TemporaryDirectory(prefix='pyams_zmq-demo-') as folder:
            spare = Path(folder, 'clip.mp4')
            make_clip(spare)
            run(clip or spare, spare)
    except KeyboardInterrupt:
        sys.exit('Interrupted')
    except (ClipError, ZMQBaseError) as error:
        sys.exit(f'FAILED: {error}')


if __name__ == '__main__':
    main()
