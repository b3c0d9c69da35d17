# SPDX-License-Identifier: ZPL-2.1
"""The interfaces of this package, and its events."""

from collections.abc import Callable
from typing import Any

from zope.interface import Attribute, Interface, implementer
from zope.interface.interfaces import IObjectEvent, ObjectEvent


class IZMQProcess(Interface):
    """A process that serves a ØMQ socket beside the application.

    The attributes up to `loop_factory` are class attributes, which a subclass sets.
    """

    socket_type = Attribute('Type of the socket that `init_stream` binds')
    concurrency = Attribute(
        'Messages that are handled at a time; above 1, plain methods run in threads and must be '
        'thread-safe'
    )
    max_message_size = Attribute('Bytes of the largest message that is handled')
    max_subscription_size = Attribute(
        'Bytes of a message that a subscriber may send to a PUB or XPUB socket'
    )
    drain_timeout = Attribute('Seconds in which a stopping process finishes its messages')
    orphan_timeout = Attribute(
        'Seconds in which a process finishes its messages when its owner has died'
    )
    overdue_grace = Attribute(
        'Seconds after the time limit of a method in which it must end, if the process has a '
        'supervisor; else the process is replaced'
    )
    bind_timeout = Attribute('Seconds to wait, as a standby, for an address that is in use')
    handshake_timeout = Attribute(
        'Seconds until a peer that has not finished its handshake is disconnected'
    )
    heartbeat_interval = Attribute(
        'Seconds of silence until the system checks that the host of a peer lives'
    )
    heartbeat_timeout = Attribute('Seconds until a host that does not answer is disconnected')
    receive_hwm = Attribute(
        'Received messages that wait, per peer whose bytes are not counted: of ipc, PULL, SUB'
    )
    receive_size = Attribute('Received bytes that wait, per peer; beyond, it is disconnected')
    send_hwm = Attribute('Messages that wait to be sent, per peer')
    send_size = Attribute('Bytes that wait to be sent, per peer; beyond, it is disconnected')
    max_connections = Attribute('Connections of each address; beyond, idle ones are closed')
    backlog = Attribute('Connections that wait to be accepted')
    ipc_mode = Attribute(
        'Mode of the socket file of an ipc address; None: 0777 without the bits of the umask, or '
        '0660 with `ipc_group`'
    )
    ipc_group = Attribute('Name or id of the group of this file, or None')
    curve = Attribute('CurveServer, or None; also a keyword argument')
    loop_factory = Attribute(
        'Function that returns a new asyncio loop, for the IOLoop of the child'
    )

    context = Attribute('ØMQ context of the child, None in the parent')
    loop = Attribute('IOLoop of the child, None in the parent')
    auth_thread = Attribute(
        'Authenticator of the child, a started thread (`is_alive`, `stop`); None in the parent'
    )
    bind_addr = Attribute('Address to bind, as given')
    rep_stream = Attribute(
        'ZMQStream of the child that receives the messages; it is bound when it is first read, '
        'unless one was assigned'
    )
    handler = Attribute(
        'Class with the methods, an instance of one, or a factory that provides IZMQMessageHandler'
    )
    passwords = Attribute('Dictionary of user names and passwords, None without `auth`')
    clients = Attribute(
        'IP addresses and networks that may connect, as a tuple of strings; None if all may connect'
    )
    registry = Attribute('Registry of the application')
    bound_address = Attribute('Bound URI, with its port; None in the parent before `wait_ready`')
    draining = Attribute('True in a child that is about to stop')
    is_supervised = Attribute('True if a supervisor replaces the process when it ends')

    def start() -> None:
        """Fork the child and return at once.

        :raises ZMQStartError: in a program that cannot fork
        """

    def wait_ready(timeout: float | None = 10) -> str:
        """Wait until the child has bound its socket and serves it.

        :param timeout: seconds; None waits without end
        :return: the bound endpoint, with its real port
        :raises ZMQTimeoutError: it is still not ready after *timeout*
        :raises ZMQStartError: it ended, or was never started
        :raises Exception: the error of the child, a ZMQBindError for instance, if it can be pickled
        """

    def run() -> None:
        """Set up everything and serve until `stop`; runs in the child."""

    def setup() -> None:
        """Create context, loop, authenticator and streams; runs in the child."""

    def init_stream() -> None:
        """Handle the messages of `rep_stream`; runs in the child."""

    def kept_listeners() -> list[int]:
        """Return the descriptors of inherited listening sockets that the child uses.

        The others are closed. By default these are the sockets that are attributes of the process.
        """

    def stream(
        sock_type: int,
        addr: Any,
        bind: bool,
        callback: Callable[..., Any] | None = None,
        subscribe: bytes | str = b'',
    ) -> tuple[Any, int | None]:
        """Make a ZMQStream on the loop of the child.

        :param sock_type: type of the ØMQ socket, `zmq.REP` for instance
        :param addr: address, see :class:`pyams_zmq.endpoint.Endpoint`
        :param bind: true to bind the address, false to connect to it
        :param callback: argument for the `on_recv` of the stream
        :param subscribe: pattern of a SUB socket
        :return: the stream and its port (None for ipc)
        :raises ValueError: for an address that cannot be parsed
        :raises ZMQBindError: for an address that cannot be bound
        """

    def stop() -> None:
        """End the process.

        In the parent: ask the child to finish its messages within `drain_timeout`, wait, then
        terminate it, then kill it. In the child: finish the messages in hand, refuse others, then
        stop the loop; returns at once. In other processes, before the start and after the end it
        does nothing.
        """

    def reload() -> None:
        """Read the users and keys again, from the file or folder that was given.

        In the parent this asks the child to do so, as SIGHUP does. New connections follow the new
        rules, and messages of removed users are refused. If users or keys cannot be read, the error
        is logged and nothing changes.
        """

    def exit(num: int | None = None, frame: Any = None) -> None:
        """Signal handler of the child: finish the messages in hand, refuse others, then stop."""


class IZMQMessageHandler(Interface):
    """Callable that replies to each message of a stream exactly once."""

    handler = Attribute('Class whose methods handle the messages, one method per message type')
    rep_handler = Attribute('Instance of `handler`; its `process` is the ZMQProcess')

    def __call__(frames: list[bytes]) -> None:
        """Reply to a message.

        :param frames: frames of the message
        """


class IZMQService(Interface):
    """A service that an application declares: a utility, registered under its name."""

    name = Attribute('Name of the service')
    address = Attribute('Address to bind')
    handler = Attribute('Class with the methods, or its message handler')
    factory = Attribute('Class of its process')
    start = Attribute("How its process is started: `'auto'`, `'external'` or `'never'`")

    def make_process(registry: Any) -> Any:
        """Make the process of the service, without starting it.

        :param registry: registry of the application
        """

    def make_client() -> Any:
        """Make a client of the service."""


class IZMQClientFactory(Interface):
    """Utility that makes the clients of requests; `pyams_zmq.testing` replaces it."""

    def __call__(service: IZMQService) -> Any:
        """Make a client.

        :param service: declared service
        """


class IZMQProcessEvent(IObjectEvent):
    """Event of a ZMQProcess, its object, notified to the registry of the process.

    It is notified in the child, unless the interface of the event says otherwise.
    """


class IZMQProcessStartedEvent(IZMQProcessEvent):
    """The sockets of the process are bound, it is about to serve."""


class IZMQProcessStoppedEvent(IZMQProcessEvent):
    """The process has stopped serving; its sockets are about to be closed."""


class IZMQProcessGivenUpEvent(IZMQProcessEvent):
    """The process has failed several times in a row, so its supervisor starts it less often.

    It is sent once, with the first long pause. It is notified in the process of the supervisor. Its
    object is the last process that was started; None if no process could be made.
    """

    name = Attribute('Name of the child of the supervisor')
    exit_code = Attribute('Exit code of the last process, negative for a signal; None if unknown')


@implementer(IZMQProcessStartedEvent)
class ZMQProcessStartedEvent(ObjectEvent):
    """See :class:`IZMQProcessStartedEvent`."""


@implementer(IZMQProcessStoppedEvent)
class ZMQProcessStoppedEvent(ObjectEvent):
    """See :class:`IZMQProcessStoppedEvent`."""


@implementer(IZMQProcessGivenUpEvent)
class ZMQProcessGivenUpEvent(ObjectEvent):
    """See :class:`IZMQProcessGivenUpEvent`.

    :param process: last process that was started, or None
    :param name: name of the child of the supervisor
    :param exit_code: exit code of the process, or None
    """

    def __init__(self, process: Any, name: str, exit_code: int | None):
        super().__init__(process)
        self.name = name
        self.exit_code = exit_code
