# SPDX-License-Identifier: ZPL-2.1
"""A service that converts video clips in the background, built on jobs of pyams_zmq."""

import os
from functools import partial
from pathlib import Path

import clips
from imageio_ffmpeg import get_ffmpeg_exe

from pyams_zmq.exceptions import ZMQMessageError
from pyams_zmq.jobs import zmq_job


class Converter:
    """Handles the messages."""

    def __init__(self):
        get_ffmpeg_exe()  # a service without ffmpeg does not start

    @zmq_job(retries=2, backoff=1, timeout=4 * 3600)
    def convert(self, args, *, job):
        """Convert a clip: `{'path': '/clips/film.mov', 'format': 'webm'}`."""
        source, target, format_name = check(args)
        # Beside the target, because a rename works only within one file system.
        part = target.with_name(f'.{job.id}.part')
        try:
            # If the worker was killed in a former attempt, its file is left, and its ffmpeg may
            # still write to it for some seconds: so it is removed, and not written again.
            part.unlink(missing_ok=True)
            part.touch()
            clips.convert(source, part, format_name, partial(job.progress, text='converting'))
            part.replace(target)
        except clips.ClipError as error:
            raise ZMQMessageError(422, str(error)) from None  # 4xx: it is not tried again
        except OSError as error:
            raise ZMQMessageError(500, f'Cannot write {target}: {error.strerror}') from None
        finally:
            part.unlink(missing_ok=True)
        return [200, str(target)]

    def formats(self, _args):
        """Return the names of the target formats."""
        return [200, list(clips.FORMATS)]


def check(args):
    """Return the paths of the clip and of the result, and the name of the format."""
    match args:
        case {'path': str(path), 'format': str(name), **rest} if not rest:
            pass
        case _:
            raise ZMQMessageError(400, "'convert' takes {'path': PATH, 'format': FORMAT}")
    if name not in clips.FORMATS:
        raise ZMQMessageError(400, f'Unknown format {name!r}, known: {", ".join(clips.FORMATS)}')
    if not Path(path).is_absolute():
        raise ZMQMessageError(400, f'The path {path!r} is not absolute')
    try:
        source = Path(path).resolve(strict=True)
        str(source).encode()  # else it cannot be in a reply
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, 'strerror', error)
        raise ZMQMessageError(404, f'Cannot open {path!r}: {reason}') from None
    if not source.is_file():
        raise ZMQMessageError(400, f'{path!r} is not a file')
    target = Path(f'{source}.{name}')  # never the clip itself: the suffix is appended
    if os.path.isdir(target):  # is_dir() raises for a long name
        raise ZMQMessageError(409, f'Cannot write {target}: it is a folder')
    return source, target, name
