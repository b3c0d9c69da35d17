# SPDX-License-Identifier: ZPL-2.1
"""Locks of addresses."""

from pyams_zmq.process.address_lock import AddressLock
from pyams_zmq.wire.endpoint import Endpoint


def locks_of(address, *keys):
    """Return locks of an address; a key is that of an application."""
    endpoints = [Endpoint.parse(address, bind=True)]
    return [AddressLock(endpoints, key, f'application {key}') for key in keys]
