# SPDX-License-Identifier: ZPL-2.1
"""The media converter example, with a real ffmpeg and real clips."""

import os
import random
import re
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
from pyams_zmq.client import ZMQClient
from pyams_zmq.exceptions import ZMQJobError, ZMQRemoteError
from pyams_zmq.pool import ZMQPool

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


class Service:
    """The service, which is started again with the same journal, and its client."""

    def __init__(self, start, journal):
        self._start = start
        self._journal = journal
        self.start()

    def start(self):
        self.pool = self._start('127.0.0.1', converter.Converter, factory=self.make_pool, workers=3)
        self.client = ZMQClient(self.pool.bound_address, timeout=TIMEOUT)

    def make_pool(self, *args, **kwargs):
        pool = ZMQPool(*args, **kwargs)
        pool.journal = self._journal
        return pool

    def convert(self, path, name='webm', **options):
        """Submit a conversion; return the id of its job."""
        return self.client.submit('convert', {'path': str(path), 'format': name}, **options).id

    def result(self, job_id):
        return self.client.result(job_id, timeout=TIMEOUT)

    def fail(self, job_id):
        """Wait for the end of a job that fails; return status and text."""
        with pytest.raises(ZMQRemoteError) as info:
            self.result(job_id)
        return info.value.status, info.value.text

    def make_progress(self, job_id):
        """Wait until ffmpeg has converted a part of the clip; return the attempt."""
        for job in self.client.watch(job_id, timeout=TIMEOUT):
            if job.progress is not None:
                return job.attempt
        raise AssertionError(job)

    def close(self):
        self.client.close()
        self.pool.stop()


@pytest.fixture
def service(start, studio, tmp_path_factory):
    journal = tmp_path_factory.mktemp('journal') / 'converter.jobs'
    service = Service(start, journal)
    yield service
    service.close()
    shutil.rmtree(journal.parent)


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
    job_id = service.convert(clip, name)
    assert service.result(job_id) == f'{clip}.{name}'
    about = clips.describe(f'{clip}.{name}')
    assert (about['format'], about['codecs']) == (container, codecs)
    assert about['duration'] == pytest.approx(1, abs=0.1)
    assert about['resolution'] == ('320x180' if name == 'gif' else '160x90')
    assert Path(clip).read_bytes() == before
    assert sorted(os.listdir(Path(clip).parent)) == ['clip.mp4', f'clip.mp4.{name}']


def test_result_of_an_earlier_conversion_is_replaced(service, clip):
    target = Path(f'{clip}.webm')
    target.write_text('old')
    service.result(service.convert(clip))
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
    assert service.result(service.convert(clip)) == f'{source}.webm'
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
    found = service.fail(service.client.submit('convert', data).id)
    assert found[0] == status
    assert text in found[1]
    assert service.client.call('formats') == ['gif', 'mp4', 'webm']


def test_name_that_is_not_utf8_is_refused(service, clip):
    name = os.fsencode(clip) + b'\xff'
    os.rename(clip, name)
    os.symlink(name, clip)
    status, text = service.fail(service.convert(clip))
    assert (status, 'surrogates not allowed' in text) == (404, True)


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
    job_id = service.convert(clip)
    status, text = service.fail(job_id)
    assert status == 422
    assert text.startswith(f'ffmpeg cannot convert {clip}: ')
    assert service.client.job(job_id).attempt == 1
    assert os.listdir(Path(clip).parent) == ['clip.mp4']
    good = shutil.copy(studio / 'clip.mp4', Path(clip).with_name('good.mp4'))
    service.result(service.convert(good))


def test_target_is_a_folder(service, clip):
    Path(f'{clip}.webm').mkdir()
    expected = 409, f'Cannot write {clip}.webm: it is a folder'
    assert service.fail(service.convert(clip)) == expected


def test_target_has_too_long_a_name(service, clip):
    long = Path(clip).rename(Path(clip).with_name('x' * 255))
    status, text = service.fail(service.convert(long, retries=0))
    assert text == f'Cannot write {long}.webm: File name too long'
    assert (status, os.listdir(long.parent)) == (500, [long.name])


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_folder_is_not_writable(service, clip):
    folder = Path(clip).parent
    folder.chmod(0o500)
    try:
        found = service.fail(service.convert(clip, retries=0))
    finally:
        folder.chmod(0o700)
    assert found == (500, f'Cannot write {clip}.webm: Permission denied')


def test_more_conversions_than_workers_wait(service, film, clip):
    """Meanwhile calls are answered."""
    first, second = service.convert(film), service.convert(film, 'mp4')
    third = service.convert(clip)
    service.make_progress(second)
    service.make_progress(first)
    assert service.client.call('formats') == ['gif', 'mp4', 'webm']
    assert service.client.job(third).state == 'waiting'
    [ffmpeg] = [each for each in ffmpegs(film) if 'libx264' in each.info['cmdline']]
    ffmpeg.kill()
    assert service.fail(second)[1].endswith('exit code -9')
    service.result(third)
    service.client.cancel(first)
    assert service.fail(first)[0] == 410


def test_conversion_is_cancelled(service, film):
    job_id = service.convert(film)
    service.make_progress(job_id)
    service.client.cancel(job_id)
    assert service.fail(job_id)[0] == 410
    assert not ffmpegs(film)
    assert os.listdir(Path(film).parent) == ['film.mp4']


def test_conversion_is_cancelled_by_force(service, film):
    job_id = service.convert(film)
    service.make_progress(job_id)
    [ffmpeg] = ffmpegs(film)
    ffmpeg.suspend()  # it does not report any more
    service.client.cancel(job_id, force=True)
    assert service.fail(job_id)[0] == 410
    wait_until(lambda: not ffmpegs(film), TIMEOUT)


def test_worker_is_killed(service, film):
    """The next attempt does not care for what the former one has left."""
    job_id = service.convert(film)
    assert service.make_progress(job_id) == 1
    [ffmpeg] = ffmpegs(film)
    ffmpeg.parent().kill()
    for job in service.client.watch(job_id, timeout=TIMEOUT):
        if job.attempt == 2 and job.progress is not None:
            break
    service.client.cancel(job_id)
    assert service.fail(job_id)[0] == 410
    wait_until(lambda: not ffmpegs(film), TIMEOUT)
    assert os.listdir(Path(film).parent) == ['film.mp4']


@pytest.mark.parametrize('is_killed', [False, True])
def test_service_is_started_again(service, film, is_killed):
    """The conversion begins again; until then nothing runs."""
    job_id = service.convert(film)
    service.make_progress(job_id)
    service.client.close()
    if is_killed:
        service.pool.kill()
        service.pool.join()
    else:
        service.pool.stop()
    wait_until(lambda: not ffmpegs(film), TIMEOUT)
    service.start()
    assert service.make_progress(job_id) == 2
    service.client.cancel(job_id)
    assert service.fail(job_id)[0] == 410
    with pytest.raises(ZMQJobError, match='409'):
        service.client.cancel(job_id)
    assert os.listdir(Path(film).parent) == ['film.mp4']


def test_start_without_ffmpeg_fails(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError('No ffmpeg exe could be found')

    monkeypatch.setattr(converter, 'get_ffmpeg_exe', fail)
    process = ZMQPool('127.0.0.1', converter.Converter, workers=1)
    process.journal = tmp_path / 'converter.jobs'
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
    assert 'is on disk' in output
    assert '%, ' in output
    assert output.count('format    matroska,webm (vp9, opus, 640x360)\n   duration  5.0') == 2
    assert 'cancelled (attempt 1)\n   410 The job' in output
    assert re.search(r'kill -9 \d+\n(.*\n)+   running \(attempt 2\)\n(.*\n)+   done \(att', output)
    assert 'bytes' in output.splitlines()[-1]
    assert not os.listdir(tmp_path / 'temporary')


def test_demo_with_a_clip(demo, clip):
    own = Path(clip).rename(Path(clip).with_name('-my "own" film\'s $HOME %d.webm'))
    program = demo('--', str(own))
    output, errors = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 0, errors
    assert f'{own}.mp4\n   format    mov,mp4,' in output
    assert Path(f'{own}.mp4').is_file()


# The demo, whose conversions get time to end on a loaded machine.
PATIENT_DEMO = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLE)!r})
from pyams_zmq.pool import ZMQPool, supervisor
from pyams_zmq.process import service
supervisor.WORKER_GRACE = service.TERM_GRACE = service.KILL_GRACE = {TIMEOUT}
ZMQPool.drain_timeout = {TIMEOUT}
runpy.run_path({str(EXAMPLE / 'demo.py')!r}, run_name='__main__')
"""


@pytest.mark.parametrize(
    ('what', 'text'),
    [
        ('missing', 'No such file or directory'),
        ('folder', 'is not a file'),
        ('corrupt', 'ffmpeg cannot convert'),
        ('taken', 'it is a folder'),
    ],
)
def test_demo_fails(demo, clip, what, text):
    if what == 'corrupt':
        damage(clip, 'garbage')
    elif what == 'taken':
        Path(f'{clip}.webm').mkdir()
    argument = {'missing': f'{clip}.none', 'folder': Path(clip).parent}.get(what, clip)
    program = demo(argument, script=('-c', PATIENT_DEMO))
    output, errors = program.communicate(timeout=TIMEOUT)
    assert program.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith('FAILED: ')
    assert text in errors
    assert 'The service is still running; it converts to gif, mp4, webm' in output


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
    left = set(os.listdir(tmp_path)) - {'film.mp4', 'temporary'}
    # What was killed has left the file of its attempt, which the next one would remove.
    assert not left or (number not in (signal.SIGINT, signal.SIGTERM) and len(left) == 1)
