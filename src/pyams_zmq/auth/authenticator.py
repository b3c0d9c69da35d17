# SPDX-License-Identifier: ZPL-2.1
"""The ZAP handler: libzmq asks it about each connection to a socket with a ZAP domain (RFC 27)."""

import logging
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from threading import Thread
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator

from pyams_zmq.auth.access import UNNAMED
from pyams_zmq.auth.policy import AccessPolicy
from pyams_zmq.auth.rules import Rules
from pyams_zmq.wire.frames import POLLIN, receive, send_frames

ZAP_VERSION = b'1.0'
ZAP_ENDPOINT = 'inproc://zeromq.zap.01'

_WAKE = b'WAKE'


class Authenticator(Rules):
    """ZAP handler of a context: applies a policy, in a thread of its own.

    Its rules can be changed with the methods of :class:`Rules`.

    :param context: ØMQ context
    :param policy: policy of all ZAP domains that are not in `policies`
    :param enter: called first in the thread
    :param guard: does further work in the thread: it has sockets to wait for (`polled`), seconds
        until its next step (`timeout`), and a `step`, which is called before each reply to libzmq
    """

    def __init__(
        self,
        context: Any,
        policy: AccessPolicy,
        enter: Callable[[], None] = lambda: None,
        guard: Any = None,
    ):
        super().__init__(context, policy)
        self._enter = enter
        self._guard = guard
        if guard is not None:
            guard.wake = self._wake

    def start(self) -> None:
        """Start the thread.

        It polls: the asyncio loop in the thread of the base class takes longer to wake up than a
        whole handshake.
        """
        super(ThreadAuthenticator, self).start()
        self.pipe = self.context.socket(zmq.PAIR)
        self.pipe.linger = 1
        self.pipe.bind(self.pipe_endpoint)
        self.thread = Thread(target=self._run, name='pyams_zmq authenticator', daemon=True)
        try:
            self.thread.start()
        except RuntimeError:  # the limit of threads; `stop` would wait for this one
            self.pipe.close()
            self.pipe = None
            raise

    def _run(self) -> None:
        self._enter()
        with self.context.socket(zmq.PAIR) as pipe:
            pipe.connect(self.pipe_endpoint)
            while True:
                try:
                    return self._serve(pipe)
                except BaseException as error:  # noqa: BLE001 - it has to go on
                    self._log(
                        logging.CRITICAL,
                        'Access control stopped (%s) and restarts; until then peers are refused',
                        type(error).__name__,
                    )
                # The pending connection stays refused: libzmq gets no reply for it. Only `unbind`
                # frees the endpoint at once.
                self.zap_socket.unbind(ZAP_ENDPOINT)
                self.zap_socket.close(0)
                super(ThreadAuthenticator, self).start()

    def _wake(self) -> None:
        """Let the thread look at its guard again; for the thread that has called `start`."""
        if self.pipe is not None:
            self.pipe.send(_WAKE)

    def _serve(self, pipe: Any) -> None:
        socket: Any = self.zap_socket
        sockets = [(pipe, POLLIN), (socket, POLLIN)]
        while True:
            ready = self._poll(sockets)
            if pipe in ready and receive(pipe) != [_WAKE]:
                return
            if socket in ready and (msg := receive(socket)) is not None:
                send_frames(socket, self.answer(msg))

    def _poll(self, sockets: list[tuple[Any, int]]) -> dict[Any, int]:
        guard = self._guard
        if guard is None:
            return dict(zmq.zmq_poll(sockets))
        polled = [*sockets, *((socket, POLLIN) for socket in guard.polled)]
        timeout = guard.timeout
        ready = dict(zmq.zmq_poll(polled, -1 if timeout is None else ceil(timeout * 1000)))
        try:
            guard.step()
        except OSError as error:  # no memory for a descriptor, for instance: access control goes on
            self._log(logging.ERROR, 'Connections are not checked (%s)', str(error))
        return ready

    def answer(self, msg: list[bytes]) -> list[bytes]:
        """Return the reply to a request of libzmq; an error refuses the connection."""
        try:
            _version, _id, domain, address, _identity, mechanism, *credentials = msg
            policy = self.policies.get(domain.removesuffix(UNNAMED), self.policy)
            status, text, name = policy.check(address.decode(), mechanism, credentials)
            user = b'' if domain.endswith(UNNAMED) else name.encode()
        except Exception as error:  # noqa: BLE001 - its text may contain the credentials
            status, text, user = b'500', b'Access control failed', b''
            self._log(logging.ERROR, 'Access control failed (%s)', type(error).__name__)
        if status != b'200':
            reason = b' '.join([*msg[3:4], text]).decode(errors='replace')  # address and text
            self._log(logging.INFO, 'Connection refused: %s', reason)
        return [ZAP_VERSION, msg[1], status, text, user, b'']

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """Answer a request of libzmq that `zap_socket` has received."""
        send_frames(self.zap_socket, self.answer(msg))

    def _log(self, level: int, text: str, argument: str) -> None:
        with suppress(Exception):  # a failing log handler must not end the thread
            self.log.log(level, text, argument)
