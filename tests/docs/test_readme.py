# SPDX-License-Identifier: ZPL-2.1
"""The first example of the README, run as a program."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

README = Path(__file__).parents[2] / 'README.rst'


def test_first_example(tmp_path):
    text = README.read_text('utf-8')
    [block] = re.findall(r'\.\. code-block:: python\n\n(.*?)\n(?=\S)', text, re.DOTALL)
    code = re.sub('^    ', '', block, flags=re.MULTILINE)
    # Unchanged but for the ports, which may be in use.
    code = code.replace('127.0.0.1:25556', f'ipc://{tmp_path}/zmq')
    assert "make_server('127.0.0.1', 6543, main({})).serve_forever()" in code
    code = code.replace(
        "make_server('127.0.0.1', 6543, main({})).serve_forever()",
        "server = make_server('127.0.0.1', 0, main({}))\n"
        '    print(server.server_port, flush=True)\n'
        '    server.handle_request()',
    )
    program = tmp_path / 'app.py'
    program.write_text(code, encoding='utf-8')
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as app:
        port = int(app.stdout.readline())
        with urlopen(f'http://127.0.0.1:{port}/convert?clip=holidays.mov') as response:
            assert response.read() == b'holidays.mov will be converted'
        assert app.wait(30) == 0  # its ØMQ process has ended, too
    assert not list(tmp_path.glob('zmq*'))
