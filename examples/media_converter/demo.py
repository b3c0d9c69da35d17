# SPDX-License-Identifier: ZPL-2.1
"""Convert a clip in a ØMQ service, as a web application does."""

import argparse
import json
import signal
import sys
import time
from http import HTTPStatus
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

from clips import ClipError, describe, make_clip
from converter import ConversionMessageHandler, ConversionProcess

from pyams_zmq.exceptions import ZMQBaseError, ZMQMessageError
from pyams_zmq.socket import zmq_response, zmq_socket

PATIENCE = 60
"""Seconds without progress after which the demo gives up"""


class Client:
    """Client of the service."""

    def __init__(self, address, auth):
        self.address, self.auth = address, auth

    def ask(self, *message):
        """Send a message; return the payload of the reply."""
        with zmq_socket(self.address, auth=self.auth) as socket:
            socket.send_json(message)
            status, payload = zmq_response(socket)
        if status != HTTPStatus.OK:
            raise ZMQMessageError(status, payload)
        return payload


def convert(client, clip):
    """Convert a clip and print the progress; return the path of the result."""
    target_format = 'mp4' if clip.suffix == '.webm' else 'webm'
    message = ['convert', {'path': str(clip.absolute()), 'format': target_format}]
    start = time.monotonic()
    print('->', json.dumps(message))
    key = client.ask(*message)
    print('<-', json.dumps([200, key]), f'after {time.monotonic() - start:.3f} s')
    seen, deadline = 0, start + PATIENCE
    while (status := client.ask('status', key))['state'] == 'running':
        if status['seconds'] > seen:
            seen, deadline = status['seconds'], time.monotonic() + PATIENCE
            show_progress(seen, status['duration'])
        elif time.monotonic() > deadline:
            raise ClipError(f'The conversion has made no progress for {PATIENCE} s')
        time.sleep(0.1)  # the service does not announce progress, so poll
    if status['state'] == 'failed':
        raise ClipError(status['error'])
    print(f'   done after {time.monotonic() - start:.1f} s')
    return Path(status['target'])


def show_progress(seconds, duration):
    """Print the progress, with a bar if the length of the clip is known."""
    part = min(1, seconds / duration) if duration else 0
    bar = f'[{"#" * int(30 * part):30}] {part:4.0%}, ' if duration else ''
    print(f'   {bar}{seconds:.1f} s of the clip', flush=True)


def show_clip(path):
    """Print the properties of a clip."""
    about = describe(path)
    print(path)
    print(f'   format    {about["format"]} ({", ".join(about["codecs"])}, {about["resolution"]})')
    print(f'   duration  {about["duration"]:.2f} s')
    print(f'   size      {path.stat().st_size} bytes')


def run(clip):
    """Start the service, convert the clip, stop the service."""
    auth = f'demo:{token_hex()}'  # refuse other users of this machine
    process = ConversionProcess('127.0.0.1', ConversionMessageHandler, auth=auth)
    process.start()
    try:
        client = Client(process.wait_ready(), auth)
        print('The service is ready at', client.address)
        try:
            show_clip(convert(client, clip))
        except (ClipError, ZMQMessageError):
            formats = ', '.join(client.ask('formats', None))
            print('The service is still running; it converts to', formats)
            raise
    finally:
        process.stop()


def main():
    """Convert the clip that the command line names, or a generated one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('clip', nargs='?', type=Path, help='default: a generated clip')
    clip = parser.parse_args().clip
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` does the same as Ctrl-C
    try:
        with TemporaryDirectory(prefix='pyams_zmq-demo-') as folder:
            if clip is None:
                clip = Path(folder, 'clip.mp4')
                make_clip(clip)
            run(clip)
    except KeyboardInterrupt:
        sys.exit('Interrupted')
    except (ClipError, ZMQBaseError) as error:
        sys.exit(f'FAILED: {error}')


if __name__ == '__main__':
    main()
