# SPDX-License-Identifier: ZPL-2.1
"""Clients that have no permission to connect to an ipc address."""

import asyncio
import os

import pytest

from checks import AT_ONCE, TIMEOUT, wait_until
from handlers import MessageHandler, Process
from peers import timed
from pyams_zmq.aio import AsyncZMQClient
from pyams_zmq.client import ZMQClient
from pyams_zmq.client.permission import describe_missing_permission
from pyams_zmq.exceptions import ZMQRefusedError
from pyams_zmq.pool import PoolWorker
from pyams_zmq.socket import zmq_response, zmq_socket
from pyams_zmq.testing import running
from pyams_zmq.wire.endpoint import Endpoint
from users import NOBODY, needs_root, run_as

pytestmark = needs_root


@pytest.fixture
def closed(tmp_path, address):
    """Address of a service that serves its own user."""
    tmp_path.chmod(0o711)
    process = Process(address)
    process.ipc_mode = 0o600
    with running(process):
        yield address


def refused(call, *args):
    """Check that a call is refused at once; return the text of the error."""

    def catch():
        with pytest.raises(ZMQRefusedError) as caught:
            call(*args)
        return str(caught.value)

    text, seconds = timed(catch)
    assert seconds < AT_ONCE
    return text


def check_text(text, address):
    path = address.removeprefix('ipc://')
    assert (
        'may not write to ' + path + ', which is of root:root with mode 0600: set ipc_mode' in text
    )


def check_calls(address):
    with ZMQClient(address, timeout=60) as client:
        check_text(refused(client.call, 'echo'), address)
        check_text(refused(client.prepare), address)

    async def acall():
        async with AsyncZMQClient(address, timeout=60) as aclient:
            await aclient.call('echo')

    check_text(refused(lambda: asyncio.run(acall())), address)
    with zmq_socket(address) as sock:
        sock.send_json(['echo', 1])
        (status, text), seconds = timed(zmq_response, sock, timeout=60)
        assert (status, seconds < AT_ONCE) == (401, True)
        check_text(text, address)
        assert zmq_response(sock) == [401, text]
    worker = PoolWorker(address, MessageHandler)
    worker.start()
    check_text(refused(worker.wait_ready), address)
    worker.stop()


def test_calls(closed):
    run_as(NOBODY, NOBODY, check_calls, closed)


def check_messages(address, log):
    client = ZMQClient(address)
    check_text(refused(client.send, 'echo'), address)
    client.post('echo', b'["echo",1]')
    wait_until(lambda: 'messages wait for ipc://' in log.text)
    check_text(log.text, address)
    os._exit(0)  # the message would wait for its reply


def test_messages_without_reply(closed, caplog):
    """They wait; the log says why."""
    run_as(NOBODY, NOBODY, check_messages, closed, caplog)


def check_later_permission(address):
    path = address.removeprefix('ipc://')
    with ZMQClient(address, timeout=TIMEOUT) as client:
        refused(client.call, 'echo')
        os.seteuid(0)
        os.chmod(path, 0o666)
        os.seteuid(NOBODY)
        assert client.call('echo', 1) == 1


def test_permission_that_comes_later(closed):
    run_as(NOBODY, NOBODY, check_later_permission, closed)


def test_folder(closed, tmp_path):
    def look():
        text = describe_missing_permission(Endpoint.parse(closed, bind=False))
        assert f'may not enter the folder of {tmp_path}/zmq.sock' in text

    tmp_path.chmod(0o700)
    run_as(NOBODY, NOBODY, look)


def test_user_without_a_name(closed):
    def look():
        assert '54321' in describe_missing_permission(Endpoint.parse(closed, bind=False))

    run_as(54321, 54321, look)


@pytest.mark.parametrize('address', ['127.0.0.1:1', 'ipc://@name', 'ipc:///no/such/file'])
def test_other_addresses(address):
    assert describe_missing_permission(Endpoint.parse(address, bind=False)) is None


def test_service_that_is_there(closed):
    assert describe_missing_permission(Endpoint.parse(closed, bind=False)) is None
