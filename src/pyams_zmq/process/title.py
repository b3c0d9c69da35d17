# SPDX-License-Identifier: ZPL-2.1
"""The name of a process, as `ps` and `top` show it; else a forked process looks like its parent."""

from contextlib import suppress

PREFIX = 'pyams_zmq: '

_MAX_TITLE = 200  # characters; the system may have room for more
_MAX_COMM = 15  # bytes, see PR_SET_NAME in prctl(2)
_MIN_SERVICE = 3  # bytes of the name of the service that are left if its role is long


def set_title(name: str) -> None:
    """Let `ps` and `top` show a name for this process.

    `ps -e`, `pstree` and `top` show its first bytes. With the distribution setproctitle, the whole
    name is in the command line, which `ps aux`, `htop` and `pgrep -f` read.

    :param name: name of the process, without a secret
    """
    text = ''.join(char if char.isprintable() else '?' for char in name[:_MAX_TITLE])
    with suppress(ImportError):
        from setproctitle import setproctitle  # noqa: PLC0415 - an extra

        setproctitle(text if text.startswith('pyams_zmq ') else f'{PREFIX}{text}')
    # After it, since it puts the beginning of the title there.
    with suppress(OSError), open('/proc/self/comm', 'wb', buffering=0) as file:
        file.write(shorten(text))


def shorten(name: str) -> bytes:
    """Return the bytes of a name that the system keeps: its role stays, as in "medi worker 12".

    :param name: name of a service, or its name and the role of the process, after a blank
    """
    data = name.encode(errors='replace')
    if len(data) > _MAX_COMM:
        service, _blank, role = data.partition(b' ')
        room = max(_MIN_SERVICE, _MAX_COMM - len(role) - 1) if role else _MAX_COMM
        data = b' '.join([_cut(service, room), role])
    return _cut(data, _MAX_COMM).rstrip()


def _cut(data: bytes, size: int) -> bytes:
    """Return the first bytes of an UTF-8 text, without a part of a character."""
    return data[:size].decode(errors='ignore').encode()
