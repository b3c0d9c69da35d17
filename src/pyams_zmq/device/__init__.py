# SPDX-License-Identifier: ZPL-2.1
"""Devices that forward between two sockets, in the background."""

import os
import random
import socket as tcp
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import RLock
from types import TracebackType
from typing import Any, TypeVar

import zmq

from pyams_zmq.auth import AccessPolicy, Users, Verdict, parse_clients, parse_users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.device.proxy import (
    CANNOT_RECEIVE,
    CANNOT_SEND,
    TAKES_TURNS,
    Counts,
    NativeRelay,
    Relay,
    Statistics,
)
from pyams_zmq.device.runner import INPROC, ProcessRunner, ThreadRunner
from pyams_zmq.exceptions import ZMQBindError, ZMQClosedError, ZMQStartError
from pyams_zmq.wire.endpoint import Endpoint

QUEUE = zmq.QUEUE
FORWARDER = zmq.FORWARDER
STREAMER = zmq.STREAMER

_TYPES = {
    QUEUE: (zmq.ROUTER, zmq.DEALER),
    FORWARDER: (zmq.XSUB, zmq.XPUB),
    STREAMER: (zmq.PULL, zmq.PUSH),
}

_PORTS = 65536

# With these, sends fail, or wait, where the loop of libzmq does not expect it.
_NOT_NATIVE = (zmq.ROUTER_MANDATORY, zmq.XPUB_NODROP, zmq.SNDTIMEO)


_Self = TypeVar('_Self', bound='Device')


class _DevicePolicy(AccessPolicy):
    """Does not tell libzmq who connected: no device asks.

    libzmq 4.3.5 puts the name in front of what a peer sends; a REQ socket takes it for a broken
    reply, and drops the peer.
    """

    def check(self, address: str, mechanism: bytes, credentials: Sequence[bytes]) -> Verdict:
        """Give the verdict, without a name."""
        return super().check(address, mechanism, credentials)._replace(user='')


class _Binding:
    """An address to bind, and the listening socket that has it already, if there is one."""

    def __init__(self, address: str, listener: tcp.socket | None = None):
        self.address = address
        self.listener = listener

    def release(self) -> None:
        """Close the listening socket, once a ØMQ socket has its own copy or none will have."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None


class _Side:
    """Configuration of one socket of a device."""

    def __init__(self, name: str, socket_type: int):
        self.name = name
        self.type = socket_type
        self.options: list[tuple[int, Any]] = []
        self.bindings: list[_Binding] = []
        self.peers: list[str] = []

    @property
    def is_native(self) -> bool:
        """True when the loop of libzmq can serve the socket."""
        return self.type not in (zmq.STREAM, *TAKES_TURNS) and not any(
            option in _NOT_NATIVE and value for option, value in self.options
        )

    @property
    def addresses(self) -> list[str]:
        """All addresses."""
        return [binding.address for binding in self.bindings] + self.peers

    def set_option(self, option: int, value: Any) -> None:
        """Set an option of the socket."""
        self.options.append((option, value.encode() if isinstance(value, str) else value))

    def bind(self, address: Any) -> None:
        """Bind the socket to an address."""
        self.bindings.append(_Binding(_uri(address, bind=True)))

    def bind_to_random_port(self, address: Any, ports: list[int]) -> int:
        """Take a free port at once, and keep it for the socket."""
        endpoint = Endpoint.parse(address, bind=True)
        if endpoint.protocol != 'tcp':
            raise ValueError(f'{address!r} has no port')
        family = tcp.AF_INET6 if endpoint.is_ipv6 else tcp.AF_INET
        host = '' if endpoint.host == '*' else endpoint.host.strip('[]')
        listener = tcp.socket(family)
        try:
            port = _bind_to_any(listener, host, ports)
            listener.listen()
            # As libzmq does; else the port is not free for a restart while old connections linger.
            listener.setsockopt(tcp.SOL_SOCKET, tcp.SO_REUSEADDR, 1)
        except tcp.gaierror:
            listener.close()
            raise ValueError(f'{address!r} has no number of this machine, and no *') from None
        except OSError as error:
            listener.close()
            raise ZMQBindError(error.errno or 0, error.strerror, endpoint.uri) from None
        self.bindings.append(_Binding(f'tcp://{endpoint.host}:{port}', listener))
        return port

    def connect(self, address: Any) -> None:
        """Connect the socket to an address."""
        self.peers.append(_uri(address, bind=False))


def _uri(address: Any, *, bind: bool) -> str:
    if isinstance(address, str) and address.startswith(INPROC) and address != INPROC:
        return address
    return Endpoint.parse(address, bind=bind).uri


def _ports(lowest: int | None, end: int, tries: int) -> list[int]:
    """Give the ports to try, in any order; 0 is the choice of the system."""
    if lowest is None:
        return [0]
    if not 0 < lowest < end <= _PORTS:
        raise ValueError(f'Bad ports {lowest}..{end - 1}: write numbers of 1..{_PORTS - 1}')
    return random.sample(range(lowest, end), max(1, min(tries, end - lowest)))


def _bind_to_any(listener: tcp.socket, host: str, ports: list[int]) -> int:
    for port in ports[:-1]:
        with suppress(OSError):
            listener.bind((host, port))
            break
    else:
        listener.bind((host, ports[-1]))
    bound: int = listener.getsockname()[1]
    return bound


class Device:
    """Forwards between two sockets; `start` blocks until the end of the device.

    The sockets are configured with methods that are named as those of a socket, with the suffix of
    the one they are for: `bind_in`, `connect_out`. They count from the next start.

    Between two ROUTER sockets the first two frames are swapped: a peer puts the identity of the
    one that it addresses in front of its message, which comes out behind the one of the sender.

    The access rules hold for each socket that is bound, except on `inproc://` addresses.

    :param device_type: `QUEUE`, `FORWARDER` or `STREAMER`, gives the types of the sockets that
        are not given: ROUTER and DEALER, XSUB and XPUB, PULL and PUSH
    :param in_type: type of the `in` socket
    :param out_type: type of the `out` socket; -1 for a single socket, which gets its own messages
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param curve: keys of the device and its clients (RFC 26/CURVEZMQ)
    :raises ValueError: for an unknown device, an `in` socket without a type, or rules that cannot
        be understood
    """

    native: bool = True
    """Use the loop of libzmq where it does the job; else always that of Python"""

    context_factory: Callable[[], Any] | None = None
    """Gives a context, which its maker terminates; None for one that the device makes and ends

    A device in a process calls it there, for a new context, which the device ends.
    """

    bind_timeout: float = 2.0
    max_message_size: int = 32 * 1024 * 1024
    handshake_timeout: float = 5.0
    heartbeat_interval: float = 5.0
    heartbeat_timeout: float = 5.0
    receive_hwm: int = 1000
    send_hwm: int = 1000
    backlog: int = 100

    _reaches_inproc = True
    _prefixes: tuple[bytes, bytes] | tuple[None, None] = (None, None)
    _runner: Any = None

    def __init__(
        self,
        device_type: int = QUEUE,
        in_type: int | None = None,
        out_type: int | None = None,
        *,
        auth: Users = None,
        clients: str | Iterable[str] | None = None,
        curve: CurveServer | None = None,
    ):
        if device_type not in _TYPES:
            raise ValueError(f'Bad device {device_type!r}: write QUEUE, FORWARDER or STREAMER')
        types = _TYPES[zmq.DeviceType(device_type)]
        self._in = _Side('in', types[0] if in_type is None else in_type)
        self._out = _Side('out', types[1] if out_type is None else out_type)
        if self._in.type < 0:
            raise ValueError(f'Bad in_type {in_type}: name a type, only out_type may be -1')
        self._mon: _Side | None = None
        self._lock = RLock()  # of start and stop
        self._auth = auth
        self.users = parse_users(auth)
        self.clients = parse_clients(clients)
        self.curve = curve
        if self.users and curve is not None:
            raise ValueError('Give auth or curve: a socket has one mechanism')

    def _read_access(self) -> None:
        users = parse_users(self._auth)
        if self.curve is not None:
            self.curve.reload()
        self.users = users

    def _make_policy(self) -> AccessPolicy:
        keys = () if self.curve is None else self.curve.clients
        return _DevicePolicy(self.users, self.clients, keys)

    # Configuration

    def bind_in(self, addr: Any) -> None:
        """Bind the `in` socket.

        :param addr: address, see :class:`pyams_zmq.endpoint.Endpoint`, or `inproc://name`
        :raises ValueError: for an address that cannot be understood
        """
        self._in.bind(addr)

    def bind_in_to_random_port(
        self, addr: Any, min_port: int | None = None, max_port: int = _PORTS, max_tries: int = 100
    ) -> int:
        """Bind the `in` socket to a free port; it is taken at once, nobody else can get it.

        :param addr: host to bind, a number or `*`; its port, if there is one, is ignored
        :param min_port: lowest port; None leaves the choice to the system
        :param max_port: port above the highest one
        :param max_tries: number of ports to try
        :return: the port
        :raises ValueError: for an address that has no port, has a name instead of a number, or
            cannot be understood, or for ports that are none
        :raises ZMQBindError: no port is free, or the host is none of this machine
        """
        return self._in.bind_to_random_port(addr, _ports(min_port, max_port, max_tries))

    def connect_in(self, addr: Any) -> None:
        """Connect the `in` socket; see :meth:`bind_in`."""
        self._in.connect(addr)

    def setsockopt_in(self, opt: int, value: Any) -> None:
        """Set an option of the `in` socket, before it is bound or connected.

        :param opt: option, `zmq.IDENTITY` for instance
        :param value: number, bytes or text; what libzmq does not take is an error of `start`
        """
        self._in.set_option(opt, value)

    def bind_out(self, addr: Any) -> None:
        """Bind the `out` socket; see :meth:`bind_in`."""
        self._out.bind(addr)

    def bind_out_to_random_port(
        self, addr: Any, min_port: int | None = None, max_port: int = _PORTS, max_tries: int = 100
    ) -> int:
        """Bind the `out` socket to a free port; see :meth:`bind_in_to_random_port`."""
        return self._out.bind_to_random_port(addr, _ports(min_port, max_port, max_tries))

    def connect_out(self, addr: Any) -> None:
        """Connect the `out` socket; see :meth:`bind_in`."""
        self._out.connect(addr)

    def setsockopt_out(self, opt: int, value: Any) -> None:
        """Set an option of the `out` socket; see :meth:`setsockopt_in`."""
        self._out.set_option(opt, value)

    @property
    def addresses(self) -> dict[str, list[str]]:
        """The addresses that are bound, with their real ports, by the name of the socket."""
        return {} if self._runner is None else dict(self._runner.addresses)

    @property
    def in_address(self) -> str | None:
        """First address of the `in` socket, None if there is none."""
        return self._first_address('in')

    @property
    def out_address(self) -> str | None:
        """First address of the `out` socket, None if there is none."""
        return self._first_address('out')

    def _first_address(self, name: str) -> str | None:
        return next(iter(self.addresses.get(name, ())), None)

    # Life

    def start(self) -> None:
        """Start the device, and wait for its end; see :meth:`BackgroundDevice.start`."""
        self._launch()
        try:
            self.join()
            while self._was_restarted():
                self.join()
        finally:
            self._end()

    def _was_restarted(self) -> bool:
        with self._lock:
            return self._runner is not None and bool(self._runner.is_alive)

    def stop(self) -> None:
        """End the device; what it has taken is sent, for a second.

        Before the start and after the end: nothing. A device that waits for a peer which takes
        nothing is ended after a second; the message in hand is lost. The end of the program stops
        all devices in the background.

        :raises ZMQTimeoutError: such a device uses a foreign context: it ends with that, or when
            the peer takes the message
        :raises Exception: the error by which the device has ended meanwhile
        """
        self._end()
        if self._runner is not None:
            self._runner.check()

    def restart(self) -> None:
        """End the device, if it runs, and start it again with the addresses that it had.

        The addresses are bound when this returns; it does not wait for the end.

        :raises ValueError: users or keys cannot be read; a device that runs goes on
        :raises Exception: see :meth:`BackgroundDevice.start`
        """
        self._read_access()
        with self._lock:
            self._end()
            self._launch()

    def reload(self) -> None:
        """Read users and keys again, from the file or folder that was given.

        New connections follow the new rules; those that are there stay, `restart` ends them. SIGHUP
        does the same to the process of a device, which logs what cannot be read.

        :raises ValueError: they cannot be read, or there are none; nothing has changed
        :raises ZMQClosedError: it does not run; each start reads them, too
        """
        runner = self._running()
        self._read_access()
        runner.reload()

    def pause(self) -> None:
        """Forward nothing until `resume`; messages wait, up to the high-water marks.

        Returns when no message is under way any more.

        :raises ZMQTimeoutError: it waits for a peer which takes nothing, and pauses after that
        :raises ZMQClosedError: it does not run
        """
        self._running().pause()

    def resume(self) -> None:
        """Forward again; of a device which is not paused: nothing.

        :raises ZMQClosedError: it does not run
        """
        self._running().resume()

    def statistics(self) -> Statistics:
        """Tell what was forwarded since the start; after the end, until then.

        :raises ZMQTimeoutError: it waits for a peer which takes nothing
        :raises Exception: the error by which the device has ended
        """
        if self._runner is None:
            return Counts().summarize(is_native=self._is_native)
        counts: Counts = self._runner.statistics()
        self._runner.check()
        return counts.summarize(is_native=self._is_native)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end of the device.

        :param timeout: seconds; None waits without end
        :raises Exception: the error by which the device has ended
        """
        runner = self._runner
        if runner is not None:
            runner.join(timeout)
            runner.check()

    @property
    def done(self) -> bool:
        """True when the device was started, and has ended."""
        return self._runner is not None and not self._runner.is_alive

    @property
    def launcher(self) -> Any:
        """The thread or process of the device, None before its start."""
        return None if self._runner is None else self._runner.launcher

    def __enter__(self: _Self) -> _Self:  # noqa: PYI019 - Python 3.10 has no Self
        self._launch()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
        else:
            self._end()

    def _launch(self) -> None:
        with self._lock:
            if self._runner is not None and self._runner.is_alive:
                raise ZMQStartError(f'{self} runs already: stop it first, or restart it')
            self._read_access()  # else a user who was removed before a SIGHUP would come back
            self._check()
            try:
                self._runner = self._make_runner()
            except BaseException:
                self._runner = None
                raise
            finally:
                self._release_bindings()
            for side in self._sides:
                for binding, address in zip(
                    side.bindings, self._runner.addresses[side.name], strict=True
                ):
                    binding.address = address

    def _check(self) -> None:
        if self._has_inproc and not self._reaches_inproc:
            raise ValueError(
                f'Nobody reaches the inproc:// address of {self} in another process: use '
                'a device in a thread, or tcp:// or ipc://'
            )
        if not self._owns_context and (self.users or self.clients or self.curve):
            raise ValueError('Access rules need a context of their own, and no inproc:// address')

    def _make_runner(self) -> Any:
        return ThreadRunner(self)

    def _running(self) -> Any:
        if self._runner is None or not self._runner.is_alive:
            if self._runner is not None:
                self._runner.check()
            raise ZMQClosedError(f'{self} does not run')
        return self._runner

    def _end(self) -> None:
        with self._lock:
            self._release_bindings()
            if self._runner is not None:
                self._runner.stop()

    def _release_bindings(self) -> None:
        for side in self._sides:
            for binding in side.bindings:
                binding.release()

    @property
    def _reserved(self) -> set[int]:
        """Descriptors of the ports that were taken before the start."""
        return {
            binding.listener.fileno()
            for side in self._sides
            for binding in side.bindings
            if binding.listener is not None
        }

    @property
    def _sides(self) -> list[_Side]:
        return [self._in, self._out] + ([] if self._mon is None else [self._mon])

    @property
    def _is_native(self) -> bool:
        is_swapped = self._in.type == self._out.type == zmq.ROUTER
        can_wait = self._mon is not None and self._mon.type != zmq.PUB
        has_dead_end = any(
            source.type not in CANNOT_RECEIVE and target.type in CANNOT_SEND
            for source, target in ((self._in, self._out), (self._out, self._in))
        )
        return (
            self.native
            and self._prefixes == (None, None)
            and not (is_swapped or can_wait or has_dead_end)
            and all(side.is_native for side in self._sides)
        )

    @property
    def _has_inproc(self) -> bool:
        return any(address.startswith(INPROC) for side in self._sides for address in side.addresses)

    @property
    def _owns_context(self) -> bool:
        return self.context_factory is None and not self._has_inproc

    def _make_context(self) -> Any:
        if self.context_factory is not None:
            return self.context_factory()
        return zmq.Context.instance() if self._has_inproc else zmq.Context()

    def _make_relay(self, sockets: list[Any]) -> Any:
        if self._is_native:
            return NativeRelay(*sockets)
        monitor = None if self._mon is None else sockets[2]
        return Relay(sockets[0], sockets[1], monitor, self._prefixes)

    def __str__(self) -> str:
        sides = (f'{side.name} {" ".join(side.addresses) or "nowhere"}' for side in self._sides)
        return f'{type(self).__name__} ({", ".join(sides)})'


class BackgroundDevice(Device):
    """Device in the background: base class of those in a thread or a process."""

    def start(self) -> None:
        """Start the device; its addresses are bound when this returns.

        :raises ZMQBindError: an address cannot be bound
        :raises ZMQStartError: it runs already, or gevent has patched the program
        :raises ZMQTimeoutError: a process is not ready after 10 seconds, and `bind_timeout` for
            each address
        :raises ValueError: users or keys cannot be read; access rules in a context that others
            use, too; an `inproc://` address, or a context of the owner, for a process
        :raises zmq.ZMQError: libzmq does not take the type or an option of a socket
        """
        self._launch()


class _InProcess(BackgroundDevice):
    """Device in a process, which ends with its owner, the one that started it."""

    _reaches_inproc = False

    @property
    def _owns_context(self) -> bool:
        return True

    def _make_context(self) -> Any:
        context = super()._make_context()
        threads = _count_threads()
        context.socket(zmq.PAIR, socket_class=zmq.Socket).close()  # the first one starts them
        if _count_threads() == threads:
            raise ValueError(
                f'context_factory of {self} gave a context whose threads are in another process: '
                'let it make a new one, as zmq.Context does'
            )
        return context

    def _make_runner(self) -> Any:
        return ProcessRunner(self)


def _count_threads() -> int:
    return len(os.listdir('/proc/self/task'))


class ThreadDevice(BackgroundDevice):
    """:class:`Device` in a thread."""


class ProcessDevice(_InProcess):
    """:class:`Device` in a process of its own."""


class Proxy(Device):
    """Device with a monitor: a third socket that gets a copy of each message.

    The monitor never blocks the others: what it does not take at once, it does not get.

    :param in_type: type of the `in` socket
    :param out_type: type of the `out` socket
    :param mon_type: type of the `mon` socket
    :param access: `auth`, `clients` and `curve`, see :class:`Device`
    :raises ValueError: for a monitor that cannot send, or as a :class:`Device` does
    """

    def __init__(self, in_type: int, out_type: int, mon_type: int = zmq.PUB, **access: Any):
        super().__init__(QUEUE, in_type, out_type, **access)
        if mon_type in (-1, *CANNOT_SEND):
            raise ValueError(f'Bad mon_type {mon_type}: a monitor sends, as PUB and PUSH do')
        # An XPUB socket would collect the subscriptions, which nobody reads here.
        is_publisher = mon_type in (zmq.PUB, zmq.XPUB)
        self._monitor = self._mon = _Side('mon', zmq.PUB if is_publisher else mon_type)

    def bind_mon(self, addr: Any) -> None:
        """Bind the `mon` socket; see :meth:`Device.bind_in`."""
        self._monitor.bind(addr)

    def bind_mon_to_random_port(
        self, addr: Any, min_port: int | None = None, max_port: int = _PORTS, max_tries: int = 100
    ) -> int:
        """Bind the `mon` socket to a free port; see :meth:`Device.bind_in_to_random_port`."""
        return self._monitor.bind_to_random_port(addr, _ports(min_port, max_port, max_tries))

    def connect_mon(self, addr: Any) -> None:
        """Connect the `mon` socket; see :meth:`Device.bind_in`."""
        self._monitor.connect(addr)

    def setsockopt_mon(self, opt: int, value: Any) -> None:
        """Set an option of the `mon` socket; see :meth:`Device.setsockopt_in`."""
        self._monitor.set_option(opt, value)

    @property
    def mon_address(self) -> str | None:
        """First address of the `mon` socket, None if there is none."""
        return self._first_address('mon')


class ThreadProxy(Proxy, BackgroundDevice):
    """:class:`Proxy` in a thread."""


class ProcessProxy(Proxy, _InProcess):
    """:class:`Proxy` in a process of its own."""


class MonitoredQueue(Proxy):
    """Proxy whose monitor tells the directions apart.

    :param in_type: type of the `in` socket
    :param out_type: type of the `out` socket
    :param mon_type: type of the `mon` socket
    :param in_prefix: first frame of the copies of what came in on the `in` socket, text or bytes
    :param out_prefix: first frame of the copies of what came in on the `out` socket
    :param access: `auth`, `clients` and `curve`, see :class:`Device`
    """

    def __init__(
        self,
        in_type: int,
        out_type: int,
        mon_type: int = zmq.PUB,
        in_prefix: bytes | str = b'in',
        out_prefix: bytes | str = b'out',
        **access: Any,
    ):
        super().__init__(in_type, out_type, mon_type, **access)
        self._prefixes = _encode(in_prefix), _encode(out_prefix)


class ThreadMonitoredQueue(MonitoredQueue, BackgroundDevice):
    """:class:`MonitoredQueue` in a thread."""


class ProcessMonitoredQueue(MonitoredQueue, _InProcess):
    """:class:`MonitoredQueue` in a process of its own."""


def monitored_queue(
    in_socket: Any,
    out_socket: Any,
    mon_socket: Any,
    in_prefix: bytes | str = b'in',
    out_prefix: bytes | str = b'out',
) -> None:
    """Forward between two sockets of the caller; see :class:`MonitoredQueue`.

    :raises zmq.ContextTerminated: at the end of the context of the sockets
    """
    Relay(in_socket, out_socket, mon_socket, (_encode(in_prefix), _encode(out_prefix))).run()


def _encode(prefix: bytes | str) -> bytes:
    return prefix.encode() if isinstance(prefix, str) else prefix
