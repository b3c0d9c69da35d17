# SPDX-License-Identifier: ZPL-2.1
"""Client sockets; public names of `pyams_zmq.client.socket`."""

from pyams_zmq.client.socket import ZMQSocket, zmq_response, zmq_socket

__all__ = ['ZMQSocket', 'zmq_response', 'zmq_socket']
