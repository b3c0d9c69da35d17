# SPDX-License-Identifier: ZPL-2.1
"""The unit of systemd in the documentation: what it starts, and its times."""

import re
import shlex
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from pyams_zmq.cli import main
from pyams_zmq.process import ZMQProcess

PAGE = Path(__file__).parents[2] / 'docs' / 'howto' / 'deploy.rst'


@pytest.fixture
def unit():
    """Return the section of the service."""
    blocks = re.findall(r'\.\. code-block:: ini\n\n((?:    .*\n|\n)+)', PAGE.read_text())
    [text] = [block for block in blocks if 'ExecStart' in block]
    parser = RawConfigParser(comment_prefixes=('#', ';'), delimiters=('=',))
    parser.optionxform = str
    parser.read_string(re.sub('^    ', '', text, flags=re.MULTILINE))
    assert parser.sections() == ['Unit', 'Service', 'Install']
    return parser['Service']


def test_command(unit, capsys, monkeypatch):
    """The command line knows it; its file does not exist here."""
    program, *arguments = shlex.split(unit['ExecStart'])
    assert program.endswith('/bin/pyams_zmq')
    monkeypatch.setattr(sys, 'argv', ['pyams_zmq'])
    with pytest.raises(SystemExit):
        main(arguments)
    assert 'file production.ini does not exist' in capsys.readouterr().err
    assert unit['ExecReload'].endswith('-HUP $MAINPID')


def test_times(unit):
    assert unit['Type'] == 'notify'
    assert float(unit['WatchdogSec']) >= 10
    assert float(unit['TimeoutStartSec']) >= 30
    assert float(unit['TimeoutStopSec']) >= ZMQProcess.drain_timeout + 8
    assert unit['KillMode'] == 'mixed'
