# SPDX-License-Identifier: ZPL-2.1
"""Configuration and life of a device."""

import logging
from collections.abc import Callable, Iterable
from threading import RLock
from typing import Any, TypeVar

import zmq

from pyams_zmq.auth import AccessAttributes, Users
from pyams_zmq.auth.curve import CurveServer
from pyams_zmq.device.direction import CANNOT_RECEIVE, CANNOT_SEND, Prefix
from pyams_zmq.device.proxy import NO_COUNTS, PythonLoop, Statistics, summarize
from pyams_zmq.device.socket_config import INPROC, PORTS, Binding, SocketConfig
from pyams_zmq.device.thread import DeviceThread
from pyams_zmq.exceptions import ZMQClosedError, ZMQStartError
from pyams_zmq.process.server_socket import SocketLimits
from pyams_zmq.wire.context import check_descriptors
from pyams_zmq.wire.message import check_boolean

QUEUE = zmq.QUEUE
FORWARDER = zmq.FORWARDER
STREAMER = zmq.STREAMER

_SOCKET_TYPES = {
    QUEUE: (zmq.ROUTER, zmq.DEALER),
    FORWARDER: (zmq.XSUB, zmq.XPUB),
    STREAMER: (zmq.PULL, zmq.PUSH),
}

_SHARED_CONTEXT = (
    'Access rules need a context of the device: remove auth, clients and curve, or '
    'context_factory and inproc:// addresses'
)

LOGGER = logging.getLogger('PyAMS (zmq)')

_Self = TypeVar('_Self', bound='Device')


def _get_types(device_type: int) -> tuple[int, int]:
    if device_type not in _SOCKET_TYPES:
        raise ValueError(f'Bad device {device_type!r}: use QUEUE, FORWARDER or STREAMER')
    return _SOCKET_TYPES[zmq.DeviceType(device_type)]


def _check_in_type(in_type: int) -> int:
    if in_type < 0:
        raise ValueError(f'Bad in_type {in_type}: use a socket type, only out_type can be -1')
    return in_type


class Device(AccessAttributes, SocketLimits):
    """Forwards messages between two sockets; `start` blocks until the device ends.

    The sockets are configured with methods that are named as those of a socket, with the name of
    the socket as suffix: `bind_in`, `connect_out`. A change takes effect at the next start.

    Between two ROUTER sockets the first two frames are swapped: a peer puts the identity of the
    addressee in front of its message, and the addressee finds the identity of the sender there.

    The access rules apply to each socket that is bound, except at `inproc://` addresses.

    :param device_type: `QUEUE`, `FORWARDER` or `STREAMER`; the default types of its sockets are
        ROUTER and DEALER, XSUB and XPUB, PULL and PUSH
    :param in_type: type of the `in` socket
    :param out_type: type of the `out` socket; -1 for a device with one socket, which gets its own
        messages
    :param auth: users that may connect, see :func:`pyams_zmq.auth.parse_users`
    :param clients: addresses that may connect, see :func:`pyams_zmq.auth.parse_clients`
    :param curve: keys of the device and its clients (RFC 26/CURVEZMQ), by default those of the
        class attribute
    :raises ValueError: the device type, `in_type` or an access rule is not valid
    :raises TypeError: for a *curve* of another class
    """

    native: bool = True
    """Use the loop of libzmq where it can do the job; False always uses the loop in Python"""

    context_factory: Callable[[], Any] | None = None
    """Returns the context to use; the device does not terminate it. None: the device makes its own

    A device in a process calls it in the process, for a new context, which the device terminates.
    """

    max_message_size: int = 32 * 1024 * 1024
    """Bytes of the largest message; libzmq drops the peer of a larger one"""

    launcher: Any = None
    """The thread or process of the device; None before its start"""

    _launcher_class: Any = DeviceThread
    _prefixes: tuple[Prefix, Prefix] = (None, None)

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
        types = _get_types(device_type)
        self._device_type = device_type
        self._in = SocketConfig('in', types[0] if in_type is None else _check_in_type(in_type))
        self._out = SocketConfig('out', types[1] if out_type is None else out_type)
        self._sockets = [self._in, self._out]
        self._lock = RLock()  # of start and stop
        self._has_warned = False
        self.set_access(auth, clients, curve)

    # Configuration

    @property
    def device_type(self) -> int:
        """Type of the device; a new one does not change the types of the sockets."""
        return self._device_type

    @device_type.setter
    def device_type(self, device_type: int) -> None:
        _get_types(device_type)
        self._device_type = device_type

    @property
    def in_type(self) -> int:
        """Type of the `in` socket."""
        return self._in.type

    @in_type.setter
    def in_type(self, in_type: int) -> None:
        self._in.type = _check_in_type(in_type)

    @property
    def out_type(self) -> int:
        """Type of the `out` socket; -1 for a device with one socket."""
        return self._out.type

    @out_type.setter
    def out_type(self, out_type: int) -> None:
        self._out.type = out_type

    @property
    def daemon(self) -> bool:
        """True: a device always ends with the program; False is accepted, with a warning once."""
        return True

    @daemon.setter
    def daemon(self, daemon: bool) -> None:
        if not (daemon or self._has_warned):
            self._has_warned = True
            LOGGER.warning('%s ends with the program, daemon = False has no effect: use join', self)

    def bind_in(self, addr: Any) -> None:
        """Bind the `in` socket.

        :param addr: address, see :class:`pyams_zmq.endpoint.Endpoint`, or `inproc://name`
        :raises ValueError: the address is not valid
        """
        self._in.bind(addr)

    def bind_in_to_random_port(
        self, addr: Any, min_port: int | None = None, max_port: int = PORTS, max_tries: int = 100
    ) -> int:
        """Bind the `in` socket to a free port, which is reserved at once.

        :param addr: numeric address of this machine, or `*`; a port in it is ignored
        :param min_port: lowest port; None leaves the choice to the system
        :param max_port: highest port + 1
        :param max_tries: number of ports to try
        :return: the port
        :raises ValueError: the address is not valid, not a tcp address or not numeric, or the
            range of ports is not valid
        :raises ZMQBindError: no port is free, or the address does not belong to this machine
        """
        return self._in.bind_to_random_port(addr, min_port, max_port, max_tries)

    def connect_in(self, addr: Any) -> None:
        """Connect the `in` socket; see :meth:`bind_in`."""
        self._in.connect(addr)

    def setsockopt_in(self, opt: int, value: Any) -> None:
        """Set an option of the `in` socket, before it is bound or connected.

        :param opt: option, `zmq.IDENTITY` for instance
        :param value: number, bytes or text; `start` raises the error if libzmq rejects it
        """
        self._in.set_option(opt, value)

    def bind_out(self, addr: Any) -> None:
        """Bind the `out` socket; see :meth:`bind_in`."""
        self._out.bind(addr)

    def bind_out_to_random_port(
        self, addr: Any, min_port: int | None = None, max_port: int = PORTS, max_tries: int = 100
    ) -> int:
        """Bind the `out` socket to a free port; see :meth:`bind_in_to_random_port`."""
        return self._out.bind_to_random_port(addr, min_port, max_port, max_tries)

    def connect_out(self, addr: Any) -> None:
        """Connect the `out` socket; see :meth:`bind_in`."""
        self._out.connect(addr)

    def setsockopt_out(self, opt: int, value: Any) -> None:
        """Set an option of the `out` socket; see :meth:`setsockopt_in`."""
        self._out.set_option(opt, value)

    @property
    def addresses(self) -> dict[str, list[str]]:
        """The bound addresses, with their real ports, by the name of the socket."""
        return {} if self.launcher is None else dict(self.launcher.addresses)

    @property
    def in_address(self) -> str | None:
        """First bound address of the `in` socket, None if there is none."""
        return self._first_address('in')

    @property
    def out_address(self) -> str | None:
        """First bound address of the `out` socket, None if there is none."""
        return self._first_address('out')

    def _first_address(self, name: str) -> str | None:
        return next(iter(self.addresses.get(name, ())), None)

    # Life

    def start(self) -> None:
        """Start the device, and wait until it ends; see :meth:`BackgroundDevice.start`."""
        self._launch()
        is_running = True
        try:
            while is_running:
                self.join()
                with self._lock:  # of a restart
                    is_running = self._is_running
        finally:
            self._end()

    def stop(self) -> None:
        """End the device; what it has received is sent first, for at most a second.

        Does nothing before the start and after the end. If a peer does not read, the device ends
        after a second and the message in hand is lost. All devices in the background end with
        the program.

        :raises ZMQTimeoutError: a peer does not read, and the context is not that of the device,
            which ends with the context, or when the peer reads
        :raises Exception: the error by which the device has ended before
        """
        self._end()
        if self.launcher is not None:
            self.launcher.check()

    def restart(self) -> None:
        """End the device if it is running, and start it again with the same addresses.

        The addresses are bound when this returns, also for a device in the foreground.

        :raises ValueError: users or keys cannot be read; a running device goes on
        :raises Exception: see :meth:`BackgroundDevice.start`
        """
        self.access.reload()
        with self._lock:
            self._end()
            self._launch()

    def reload(self) -> None:
        """Read users and keys again, from the file or folder that was configured.

        New connections follow the new rules; existing ones stay until `restart`. SIGHUP does the
        same in the process of a device, which logs what cannot be read.

        :raises ValueError: they cannot be read, or the file is empty; nothing has changed
        :raises ZMQClosedError: the device is not running; each start reads them as well
        """
        self._get_launcher()
        self.access.reload()
        LOGGER.info('%s has read its users and keys again', self)

    def pause(self) -> None:
        """Forward nothing until `resume`; messages wait, up to the high-water marks.

        When this returns, the device forwards no message.

        :raises ZMQTimeoutError: a peer does not read; the device pauses as soon as it does
        :raises ZMQClosedError: the device is not running
        """
        self._get_launcher().pause()

    def resume(self) -> None:
        """Forward again; does nothing if the device is not paused.

        :raises ZMQClosedError: the device is not running
        """
        self._get_launcher().resume()

    def statistics(self) -> Statistics:
        """Return what was forwarded since the start, also after the end.

        :raises ZMQTimeoutError: a peer does not read
        :raises Exception: the error by which the device has ended
        """
        launcher = self.launcher
        if launcher is None:
            return summarize(NO_COUNTS, is_native=self._is_native)
        statistics: Statistics = launcher.statistics()
        launcher.check()
        return statistics

    def join(self, timeout: float | None = None) -> None:
        """Wait until the device ends.

        :param timeout: seconds; None waits without limit
        :raises Exception: the error by which the device has ended
        """
        launcher = self.launcher
        if launcher is not None:
            launcher.join(timeout)
            launcher.check()

    @property
    def done(self) -> bool:
        """True when the device was started and has ended."""
        return self.launcher is not None and not self.launcher.is_running

    def __enter__(self: _Self) -> _Self:  # noqa: PYI019 - Python 3.10 has no Self
        self._launch()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        if kind is None:
            self.stop()
        else:
            self._end()

    def _launch(self) -> None:
        with self._lock:
            if self._is_running:
                raise ZMQStartError(f'{self} is already running: stop it first, or restart it')
            self.access.reload()  # else a user who was removed before a SIGHUP would come back
            self.check_curve()
            self._check()
            self.launcher = None
            launcher = self._launcher_class(self)
            try:
                launcher.start()
            finally:
                self._release_bindings()
            self.launcher = launcher
            for config in self._sockets:
                addresses = launcher.addresses[config.name]
                for binding, address in zip(config.bindings, addresses, strict=True):
                    binding.address = address  # which a restart binds again

    def _check(self) -> None:
        if not self._owns_context and (self.access.has_credentials or self.clients):
            raise ValueError(_SHARED_CONTEXT)

    def _is_set_up(self) -> bool:
        is_running = super()._is_set_up() or self._is_running
        if is_running and not self._owns_context:
            raise ValueError(_SHARED_CONTEXT)
        return is_running

    @property
    def _is_running(self) -> bool:
        return self.launcher is not None and bool(self.launcher.is_running)

    def _get_launcher(self) -> Any:
        launcher = self.launcher
        if launcher is None or not launcher.is_running:
            if launcher is not None:
                launcher.check()
            raise ZMQClosedError(f'{self} is not running')
        return launcher

    def _end(self) -> None:
        launcher = self.launcher
        if launcher is not None and launcher.defer_stop():
            return  # another thread may have the lock, and wait for the command of this one
        with self._lock:
            self._release_bindings()
            if self.launcher is not None:
                self.launcher.stop()

    def _release_bindings(self) -> None:
        for binding in self._bindings:
            binding.release()

    # For the thread or process of the device

    @property
    def _bindings(self) -> list[Binding]:
        return [binding for config in self._sockets for binding in config.bindings]

    @property
    def _is_native(self) -> bool:
        is_swapped = self._in.type == self._out.type == zmq.ROUTER
        can_block = any(monitor.type != zmq.PUB for monitor in self._sockets[2:])
        has_dead_end = any(
            source.type not in CANNOT_RECEIVE and target.type in CANNOT_SEND
            for source, target in ((self._in, self._out), (self._out, self._in))
        )
        return (
            check_boolean('native', self.native)
            and self._prefixes == (None, None)
            and not (is_swapped or can_block or has_dead_end)
            and all(config.is_native for config in self._sockets)
        )

    def _max_size_of(self, config: SocketConfig) -> int:
        """Return the bytes of the largest message that a socket may receive."""
        target = self._in if config is self._out else self._out
        target_type = self._in.type if target.type < 0 else target.type
        # An XSUB socket takes each message that begins with 1 for a subscription.
        return self.max_subscription_size if target_type == zmq.XSUB else self.max_message_size

    @property
    def _has_inproc(self) -> bool:
        return any(
            address.startswith(INPROC) for config in self._sockets for address in config.addresses
        )

    @property
    def _owns_context(self) -> bool:
        return self.context_factory is None and not self._has_inproc

    def _make_context(self) -> Any:
        check_descriptors()
        if self.context_factory is not None:
            return self.context_factory()
        return zmq.Context.instance() if self._has_inproc else zmq.Context()

    def _make_loop(self, sockets: list[Any]) -> PythonLoop:
        return PythonLoop(
            *sockets,
            prefixes=self._prefixes,
            counts_as_native=self._is_native,
            keeps_gil=self._owns_context,
        )

    def __str__(self) -> str:
        sockets = (
            f'{config.name} {" ".join(config.addresses) or "nowhere"}' for config in self._sockets
        )
        return f'{type(self).__name__} ({", ".join(sockets)})'


class BackgroundDevice(Device):
    """Base class of the devices in a thread or a process."""

    def start(self) -> None:
        """Start the device; its addresses are bound when this returns.

        :raises ZMQBindError: an address cannot be bound
        :raises ZMQStartError: the device is already running, or the program has no threads
        :raises ZMQTimeoutError: a process is not ready after 10 seconds, and `bind_timeout` for
            each address
        :raises ValueError: users or keys cannot be read; a device with access rules uses a shared
            context; a device in a process uses an `inproc://` address or a context made before the
            fork
        :raises zmq.ZMQError: libzmq rejects the type or an option of a socket; EMFILE, when the
            process has no descriptor left
        """
        self._launch()
