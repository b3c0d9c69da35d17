# SPDX-License-Identifier: ZPL-2.1
"""The media converter example, with a real ffmpeg and real clips."""

import os
import random
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from checks import wait_until

EXAMPLE = Path(__file__).parents[2] / 'examples' / 'media_converter'

sys.path.insert(0, str(EXAMPLE))
clips = import_module('clips')
converter = import_module('converter')
sys.path.remove(str(EXAMPLE))

TIMEOUT = 60
"""Seconds for a conversion on a loaded machine"""


@pytest.fixture(scope='session')
def studio(tmp_path_factory):
    """Return a folder with a short clip, and a film whose conversion takes minutes."""
    folder = tmp_path_factory.mktemp('studio')
    clip, film = folder / 'clip.mp4', folder / 'film.mp4'
    clips.make_clip(clip, 1, '160x90')
    clips.make_clip(film, 1)
    command = [get_ffmpeg_exe(), '-v', 'error', '-stream_loop', '300', '-i', film, '-c', 'copy']
    subprocess.run([*command, folder / 'long.mp4'], check=True)
    (folder / 'long.mp4').replace(film)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def clip(studio, tmp_path):
    yield shutil.copy(studio / 'clip.mp4', tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def film(studio, tmp_path):
    yield shutil.copy(studio / 'film.mp4', tmp_path)
    assert not ffmpegs(tmp_path)
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def service(start, ask, monkeypatch):
    """A service that ends its conversions soon, and gives them time to end on a loaded machine."""
    for name in ('TERM_GRACE', 'KILL_GRACE'):
        monkeypatch.setattr(f'pyams_zmq.process.service.{name}', TIMEOUT)
    monkeypatch.setattr(converter.ConversionProcess, 'drain_timeout', TIMEOUT)
    process = start(
        '127.0.0.1', converter.ConversionMessageHandler, factory=converter.ConversionProcess
    )
    process.ask = lambda *message: ask(process, message, timeout=TIMEOUT)
    return process


def convert(service, path, name='webm'):
    """Start a conversion; return its key."""
    status, key = service.ask('convert', {'path': str(path), 'format': name})
    assert status == 200, key
    return key


def result(service, key):
    """Wait for the end of a conversion; return its last status."""
    wait_until(lambda: service.ask('status', key)[1]['state'] != 'running', TIMEOUT)
    return service.ask('status', key)[1]


def make_progress(service, key):
    """Wait until ffmpeg has converted a part of the clip."""
    wait_until(lambda: service.ask('status', key)[1]['seconds'] > 0, TIMEOUT)


def ffmpegs(folder):
    """Return the ffmpeg processes that convert a clip of a folder."""
    return [
        process
        for process in psutil.process_iter(['cmdline'])
        if get_ffmpeg_exe() in (process.info['cmdline'] or [])
        and str(folder) in ' '.join(process.info['cmdline'])
    ]


@pytest.mark.parametrize(
    ('name', 'container', 'codecs'),
    [
        ('gif', 'gif', ['gif']),
        ('mp4', 'mov,mp4,m4a,3gp,3g2,mj2', ['h264', 'aac']),
        ('webm', 'matroska,webm', ['vp9', 'opus']),
    ],
)
def test_conversion(service, clip, name, container, codecs):
    before = Path(clip).read_bytes()
    status = result(service, convert(service, clip, name))
    assert status == status | {'state': 'done', 'error': None, 'target': f'{clip}.{name}'}
    assert 0.5 < status['seconds'] <= 1.2
    assert status['duration'] == pytest.approx(1, abs=0.1)
    about = clips.describe(status['target'])
    assert (about['format'], about['codecs']) == (container, codecs)
    assert about['duration'] == pytest.approx(1, abs=0.1)
    assert about['resolution'] == ('320x180' if name == 'gif' else '160x90')
    assert Path(clip).read_bytes() == before
    assert sorted(os.listdir(Path(clip).parent)) == ['clip.mp4', f'clip.mp4.{name}']


def test_result_of_an_earlier_conversion_is_replaced(service, clip):
    target = Path(f'{clip}.webm')
    target.write_text('old')
    assert result(service, convert(service, clip))['state'] == 'done'
    assert clips.describe(target)['format'] == 'matroska,webm'
    assert target.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_target_is_never_the_source(service, clip):
    source = Path(clip).rename(f'{clip}.webm')
    Path(clip).symlink_to(source)  # beside the link, the target would be the source
    before = source.read_bytes()
    status = result(service, convert(service, clip))
    assert (status['state'], status['target']) == ('done', f'{source}.webm')
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ('data', 'status', 'text'),
    [
        (None, 400, "'convert' takes"),
        ('/clip.mp4', 400, "'convert' takes"),
        ({'path': '/clip.mp4'}, 400, "'convert' takes"),
        ({'path': ['/clip.mp4'], 'format': 'webm'}, 400, "'convert' takes"),
        ({'path': '/clip.mp4', 'format': None}, 400, "'convert' takes"),
        ({'path': '/clip.mp4', 'format': 'webm', 'more': 1}, 400, "'convert' takes"),
        ({'path': '/clip.mp4', 'format': 'exe'}, 400, "Unknown format 'exe'"),
        ({'path': 'clip.mp4', 'format': 'webm'}, 400, 'not absolute'),
        ({'path': 'http://127.0.0.1/clip.mp4', 'format': 'webm'}, 400, 'not absolute'),
        ({'path': '/none/clip.mp4', 'format': 'webm'}, 404, 'No such file or directory'),
        ({'path': '/a\0b', 'format': 'webm'}, 404, 'null'),
        ({'path': f'/{"x" * 300}', 'format': 'webm'}, 404, 'File name too long'),
        ({'path': '/', 'format': 'webm'}, 400, 'not a file'),
        ({'path': '/dev/zero', 'format': 'webm'}, 400, 'not a file'),
    ],
)
def test_bad_request_is_refused(service, data, status, text):
    answer = service.ask('convert', data)
    assert answer[0] == status
    assert text in answer[1]
    assert service.ask('formats', None) == [200, ['gif', 'mp4', 'webm']]


def test_name_that_is_not_utf8_is_refused(service, clip):
    name = os.fsencode(clip) + b'\xff'
    os.rename(clip, name)
    os.symlink(name, clip)
    status, text = service.ask('convert', {'path': clip, 'format': 'webm'})
    assert (status, 'surrogates not allowed' in text) == (404, True)


@pytest.mark.parametrize('key', ['none', None, [], {}])
def test_status_of_an_unknown_conversion(service, key):
    assert service.ask('status', key) == [404, f'Unknown conversion {key!r}']


def damage(clip, how):
    path = Path(clip)
    if how in ('garbage', 'lookalike'):  # some bytes look like H.263 video
        seed = 1936 if how == 'lookalike' else 0
        path.write_bytes(random.Random(seed).randbytes(50_000))
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'sound':
        run_ffmpeg('-f', 'lavfi', '-i', 'sine=d=1', '-f', 'mp4', path)
    else:
        whole = path.rename(f'{path}.whole')
        run_ffmpeg('-i', whole, '-c', 'copy', '-movflags', '+faststart', path)
        whole.unlink()
        os.truncate(path, path.stat().st_size * 2 // 3)


def run_ffmpeg(*arguments):
    subprocess.run([get_ffmpeg_exe(), '-v', 'error', '-y', *arguments], check=True)


@pytest.mark.parametrize('how', ['garbage', 'lookalike', 'empty', 'sound', 'truncated'])
def test_conversion_of_a_damaged_clip_fails(service, clip, studio, how):
    damage(clip, how)
    status = result(service, convert(service, clip))
    assert status['state'] == 'failed'
    assert status['error'].startswith(f'ffmpeg cannot convert {clip}: ')
    assert os.listdir(Path(clip).parent) == ['clip.mp4']
    good = shutil.copy(studio / 'clip.mp4', Path(clip).with_name('good.mp4'))
    assert result(service, convert(service, good))['state'] == 'done'


def test_target_is_a_folder(service, clip):
    Path(f'{clip}.webm').mkdir()
    status = result(service, convert(service, clip))
    assert status['state'] == 'failed'
    assert status['error'] == f'Cannot write {clip}.webm: Is a directory'


def test_target_has_too_long_a_name(service, clip):
    long = Path(clip).rename(Path(clip).with_name('x' * 255))
    status = result(service, convert(service, long))
    assert status['state'] == 'failed'
    assert status['error'] == f'Cannot write {long}.webm: File name too long'
    assert os.listdir(long.parent) == [long.name]


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_folder_is_not_writable(service, clip):
    folder = Path(clip).parent
    folder.chmod(0o500)
    try:
        status = result(service, convert(service, clip))
    finally:
        folder.chmod(0o700)
    assert status['state'] == 'failed'
    assert status['error'] == f'Cannot write {clip}.webm: Permission denied'


def test_more_conversions_than_the_limit_are_refused(service, film, clip):
    first = convert(service, film)
    second = convert(service, film, 'mp4')
    message = {'path': clip, 'format': 'webm'}
    busy = [503, '2 conversions are running, try again later']
    assert service.ask('convert', message) == busy
    make_progress(service, second)
    make_progress(service, first)
    assert service.ask('convert', message) == busy
    [ffmpeg] = [each for each in ffmpegs(film) if 'libx264' in each.info['cmdline']]
    ffmpeg.kill()
    assert result(service, second)['error'].endswith('exit code -9')
    assert result(service, convert(service, clip))['state'] == 'done'
    assert service.ask('status', first)[1]['state'] == 'running'
    service.stop()


def test_old_results_are_forgotten(monkeypatch, start, ask, clip):
    monkeypatch.setattr(converter, 'MAX_FINISHED', 1)
    process = start(
        '127.0.0.1', converter.ConversionMessageHandler, factory=converter.ConversionProcess
    )
    process.ask = lambda *message: ask(process, message, timeout=TIMEOUT)
    keys = []
    for _turn in range(3):
        keys.append(convert(process, clip, 'gif'))
        result(process, keys[-1])
    assert [process.ask('status', key)[0] for key in keys] == [404, 200, 200]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_conversion_is_stopped(service, film, number):
    key = convert(service, film)
    make_progress(service, key)
    [ffmpeg] = ffmpegs(film)
    ffmpeg.parent().send_signal(number)
    status = result(service, key)
    assert (status['state'], status['error']) == ('failed', 'The conversion was stopped')
    assert not ffmpegs(film)
    assert os.listdir(Path(film).parent) == ['film.mp4']


def test_conversion_is_killed(service, film):
    key = convert(service, film)
    make_progress(service, key)
    [ffmpeg] = ffmpegs(film)
    ffmpeg.suspend()
    ffmpeg.parent().kill()
    status = result(service, key)
    assert (status['state'], status['error']) == ('failed', 'The conversion was killed')
    ffmpeg.kill()
    wait_until(lambda: not ffmpegs(film))


def test_service_is_stopped(service, film):
    make_progress(service, convert(service, film))
    service.stop()
    assert not ffmpegs(film)
    assert os.listdir(Path(film).parent) == ['film.mp4']


def test_service_is_stopped_right_after_the_start_of_a_conversion(service, film):
    convert(service, film)
    service.stop()
    assert not ffmpegs(film)
    assert os.listdir(Path(film).parent) == ['film.mp4']


def test_service_is_killed(service, film):
    make_progress(service, convert(service, film))
    service.kill()
    service.join()
    wait_until(lambda: not ffmpegs(film), TIMEOUT)
    wait_until(lambda: os.listdir(Path(film).parent) == ['film.mp4'])


def test_start_without_ffmpeg_fails(monkeypatch):
    def fail():
        raise RuntimeError('No ffmpeg exe could be found')

    monkeypatch.setattr(converter, 'get_ffmpeg_exe', fail)
    process = converter.ConversionProcess('127.0.0.1', converter.ConversionMessageHandler)
    process.start()
    with pytest.raises(RuntimeError, match='No ffmpeg exe'):
        process.wait_ready()
    process.join()


@pytest.fixture
def demo(tmp_path):
    """Start the demo, with its own folder for temporary files."""
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    environ = {
        'TMPDIR': str(temporary),
        'PYTHONUNBUFFERED': '1',
        # Pyramid 2 imports pkg_resources, which setuptools 80 and 81 warn about.
        'PYTHONWARNINGS': 'ignore:pkg_resources is deprecated',
    }
    started = []

    def start_demo(*arguments, script=(EXAMPLE / 'demo.py',)):
        program = subprocess.Popen(
            [sys.executable, *script, *arguments],
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(program)
        return program

    yield start_demo
    for program in started:
        with program:
            program.kill()
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_demo(demo, tmp_path):
    program = demo()
    # The output ends when all processes have ended.
    output, errors = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 0, errors
    assert '-> ["convert", {"path": ' in output
    assert '<- [200, "' in output
    assert '%, ' in output
    assert 'format    matroska,webm (vp9, opus, 640x360)\n   duration  5.0' in output
    assert 'bytes' in output.splitlines()[-1]
    assert not os.listdir(tmp_path / 'temporary')


def test_demo_with_a_clip(demo, clip):
    own = Path(clip).rename(Path(clip).with_name('-my "own" film\'s $HOME %d.webm'))
    program = demo('--', str(own))
    output, errors = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 0, errors
    assert f'{own}.mp4\n   format    mov,mp4,' in output
    assert Path(f'{own}.mp4').is_file()


@pytest.mark.parametrize(
    ('what', 'text'),
    [
        ('missing', 'No such file or directory'),
        ('folder', 'is not a file'),
        ('corrupt', 'ffmpeg cannot convert'),
        ('taken', 'Is a directory'),
    ],
)
def test_demo_fails(demo, clip, what, text):
    if what == 'corrupt':
        damage(clip, 'garbage')
    elif what == 'taken':
        Path(f'{clip}.webm').mkdir()
    argument = {'missing': f'{clip}.none', 'folder': Path(clip).parent}.get(what, clip)
    program = demo(argument)
    output, errors = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith('FAILED: ')
    assert text in errors
    assert 'The service is still running; it converts to gif, mp4, webm' in output


# The demo, whose conversions get time to end on a loaded machine.
PATIENT_DEMO = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLE)!r})
from converter import ConversionProcess
from pyams_zmq.process import service
service.TERM_GRACE = service.KILL_GRACE = {TIMEOUT}
ConversionProcess.drain_timeout = ConversionProcess.orphan_timeout = {TIMEOUT}
runpy.run_path({str(EXAMPLE / 'demo.py')!r}, run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('send', 'number'),
    [
        (os.kill, signal.SIGINT),
        (os.kill, signal.SIGTERM),
        (os.kill, signal.SIGKILL),
        (os.killpg, signal.SIGINT),  # as a terminal does at Ctrl-C
        (os.killpg, signal.SIGHUP),  # and when it is closed
    ],
)
def test_demo_is_ended(demo, film, tmp_path, send, number):
    program = demo(film, script=('-c', PATIENT_DEMO))
    wait_until(lambda: '%' in program.stdout.readline(), TIMEOUT)
    send(program.pid, number)
    _output, errors = program.communicate(timeout=TIMEOUT)
    assert 'Traceback' not in errors
    if number in (signal.SIGINT, signal.SIGTERM):
        assert program.returncode == 1
        assert 'Interrupted\n' in errors
        assert not os.listdir(tmp_path / 'temporary')
    else:
        assert program.returncode == -number
    wait_until(lambda: not ffmpegs(film))
    # The service removes its folder when ffmpeg has ended.
    wait_until(lambda: sorted(os.listdir(tmp_path)) == ['film.mp4', 'temporary'])
