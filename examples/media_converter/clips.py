# SPDX-License-Identifier: ZPL-2.1
"""Convert, describe and generate video clips with ffmpeg."""

import re
import subprocess

from imageio_ffmpeg import get_ffmpeg_exe

FORMATS = {
    'gif': '-f gif -an -vf fps=12,scale=320:-2',
    'mp4': '-f mp4 -c:v libx264 -c:a aac -pix_fmt yuv420p -vf pad=ceil(iw/2)*2:ceil(ih/2)*2',
    'webm': '-f webm -c:v libvpx-vp9 -c:a libopus -crf 32 -b:v 0 -row-mt 1 -cpu-used 2',
}
"""Target formats and their ffmpeg arguments"""

_REPORT = ['-nostats', '-loglevel', 'level+info', '-progress', 'pipe:1', '-stats_period', '0.2']
# Read local files only, even if the name of the clip or a playlist in it is a URL. Take the first
# video stream that is not a cover picture, and the first audio stream, if the clip has one.
_INPUT = ['-protocol_whitelist', 'file', '-i']
_STREAMS = ['-map', '0:V:0', '-map', '0:a:0?']
_TEST = '-f lavfi -i testsrc=d={0}:s={1}:r=25 -f lavfi -i sine=f=440:d={0}'

_TEXT = {'encoding': 'utf-8', 'errors': 'replace', 'stdin': subprocess.DEVNULL}

_DURATION = re.compile(r'  Duration: (\d+):(\d+):([\d.]+)')
_CONVERTED = re.compile(r'out_time_us=(\d+)')
_ERROR = re.compile(r'\[(?:error|fatal)\] (.+)')


class ClipError(Exception):
    """ffmpeg cannot read or write a clip."""


def convert(source, target, format_name, on_progress):
    """Convert a clip.

    `on_progress` is called with the converted seconds and the total, which is None while it is
    unknown. If it raises, ffmpeg is killed.
    """
    files = f'file:{source}', *_STREAMS, *FORMATS[format_name].split(), f'file:{target}'
    command = _command('-y', *_REPORT, *_INPUT, *files)
    seconds, duration, errors = 0, None, []
    output = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT}
    with subprocess.Popen(command, **output, **_TEXT) as ffmpeg:  # noqa: S603 - no shell
        try:
            for line in ffmpeg.stdout:
                if match := _CONVERTED.match(line):
                    seconds = max(seconds, int(match[1]) / 1e6)
                    on_progress(seconds, duration)
                elif match := _ERROR.search(line):
                    errors.append(match[1])
                elif duration is None and (match := _DURATION.search(line)):
                    duration = _seconds(match)
        except BaseException:
            ffmpeg.kill()
            raise
    # ffmpeg continues after errors. The result is good if it reached the end of the clip. It
    # also accepts some garbage as a clip; such a clip has no duration.
    is_broken = errors and (duration is None or seconds < 0.9 * duration)
    if ffmpeg.returncode != 0 or is_broken:
        reason = '; '.join(errors[:2]) or f'exit code {ffmpeg.returncode}'
        raise ClipError(f'ffmpeg cannot convert {source}: {reason}')


def describe(path):
    """Read a whole clip; return its format, codecs, resolution and duration in seconds."""
    about = _run('-i', f'file:{path}', '-map', '0', '-c', 'copy', '-f', 'null', '-')
    about = about.partition('Output #0')[0]
    return {
        'format': re.search(r'Input #0, (\S+), from', about)[1],
        'codecs': re.findall(r'Stream #.*: (?:Video|Audio): (\w+)', about),
        'resolution': re.search(r', (\d+x\d+)', about)[1],
        'duration': _seconds(_DURATION.search(about)),
    }


def make_clip(path, seconds=5, size='640x360'):
    """Generate an mp4 file with a test picture and a tone."""
    _run(*_TEST.format(seconds, size).split(), *FORMATS['mp4'].split(), f'file:{path}')


def _command(*arguments):
    return [get_ffmpeg_exe(), '-hide_banner', '-nostdin', *arguments]


def _run(*arguments):
    command = _command(*arguments)
    done = subprocess.run(command, capture_output=True, check=False, **_TEXT)  # noqa: S603 - no shell
    if done.returncode != 0:
        raise ClipError(f'ffmpeg failed: {done.stderr.splitlines()[-1]}')
    return done.stderr


def _seconds(match):
    hours, minutes, seconds = map(float, match.groups())
    return hours * 3600 + minutes * 60 + seconds
