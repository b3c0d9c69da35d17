# SPDX-License-Identifier: ZPL-2.1
"""Pyro5, with its own serializer, serpent."""

from Pyro5 import api

from contenders.base import TIMEOUT, Echo, Pair


class Pyro5(Pair):
    """Its server and its client, as its documentation shows them."""

    def serve(self, tell):
        """Serve the methods of a class."""
        with api.Daemon(host='127.0.0.1') as daemon:
            tell(str(daemon.register(api.expose(Echo))))
            daemon.requestLoop()

    def connect(self, address):
        """Return a call of a proxy."""
        proxy = api.Proxy(address)
        proxy._pyroTimeout = TIMEOUT
        return proxy.echo
