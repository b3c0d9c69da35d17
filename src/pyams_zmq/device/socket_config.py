# SPDX-License-Identifier: ZPL-2.1
"""Configuration of one socket of a device."""

import random
import socket as tcp
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from pyams_zmq.device.proxy import LOCKSTEP
from pyams_zmq.exceptions import ZMQBindError
from pyams_zmq.wire.endpoint import Endpoint

INPROC = 'inproc://'

PORTS = 65536

# With these, sends fail or wait where the loop of libzmq does not expect it.
_NOT_NATIVE = (zmq.ROUTER_MANDATORY, zmq.XPUB_NODROP, zmq.SNDTIMEO)


@dataclass
class Binding:
    """Address to bind, with the socket that already listens there for a reserved port."""

    address: str
    listener: tcp.socket | None = None

    @property
    def path(self) -> str | None:
        """Path of the file of an ipc address, else None."""
        is_inproc = self.address.startswith(INPROC)
        return None if is_inproc else Endpoint.parse(self.address, bind=True).path

    def release(self) -> None:
        """Close the listening socket; a ØMQ socket that uses it has a descriptor of its own."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None


class SocketConfig:
    """Type, options and addresses of one socket of a device.

    :param name: `in`, `out` or `mon`
    :param socket_type: type of the socket; -1 if the device uses the `in` socket instead
    """

    def __init__(self, name: str, socket_type: int):
        self.name = name
        self.type = socket_type
        self.options: list[tuple[int, Any]] = []
        self.bindings: list[Binding] = []
        self.peers: list[str] = []

    @property
    def is_native(self) -> bool:
        """True when the loop of libzmq can serve the socket."""
        return self.type not in (zmq.STREAM, *LOCKSTEP) and not any(
            option in _NOT_NATIVE and value for option, value in self.options
        )

    @property
    def addresses(self) -> list[str]:
        """Addresses to bind and to connect to."""
        return [binding.address for binding in self.bindings] + self.peers

    def set_option(self, option: int, value: Any) -> None:
        """Add an option; a text is encoded as UTF-8."""
        self.options.append((option, value.encode() if isinstance(value, str) else value))

    def bind(self, address: Any) -> None:
        """Add an address to bind."""
        self.bindings.append(Binding(_parse(address, bind=True)))

    def bind_to_random_port(self, address: Any, lowest: int | None, end: int, tries: int) -> int:
        """Add an address to bind, and reserve a free port there by listening at once."""
        ports = _choose_ports(lowest, end, tries)
        endpoint = Endpoint.parse(address, bind=True)
        if endpoint.protocol != 'tcp':
            raise ValueError(f'Bad address {address!r}: only tcp addresses have a port')
        family = tcp.AF_INET6 if endpoint.is_ipv6 else tcp.AF_INET
        host = '' if endpoint.host == '*' else endpoint.host.strip('[]')
        listener = tcp.socket(family)
        try:
            port = _bind_one_of(listener, host, ports)
            listener.listen()
            # As libzmq does; else a restart cannot bind the port while old connections linger.
            listener.setsockopt(tcp.SOL_SOCKET, tcp.SO_REUSEADDR, 1)
        except tcp.gaierror:
            listener.close()
            raise ValueError(
                f'Bad address {address!r}: write a numeric address of this machine, or *'
            ) from None
        except OSError as error:
            listener.close()
            raise ZMQBindError(error.errno or 0, error.strerror, endpoint.uri) from None
        self.bindings.append(Binding(f'tcp://{endpoint.host}:{port}', listener))
        return port

    def connect(self, address: Any) -> None:
        """Add an address to connect to."""
        self.peers.append(_parse(address, bind=False))


def _parse(address: Any, *, bind: bool) -> str:
    if isinstance(address, str) and address.startswith(INPROC) and address != INPROC:
        return address
    return Endpoint.parse(address, bind=bind).uri


def _choose_ports(lowest: int | None, end: int, tries: int) -> list[int]:
    """Return the ports to try, in random order; with port 0 the system chooses."""
    if lowest is None:
        return [0]
    if not 0 < lowest < end <= PORTS:
        raise ValueError(f'Bad ports {lowest}..{end - 1}: use numbers from 1 to {PORTS - 1}')
    return random.sample(range(lowest, end), max(1, min(tries, end - lowest)))


def _bind_one_of(listener: tcp.socket, host: str, ports: list[int]) -> int:
    for port in ports[:-1]:
        with suppress(OSError):
            listener.bind((host, port))
            break
    else:
        listener.bind((host, ports[-1]))
    bound: int = listener.getsockname()[1]
    return bound
