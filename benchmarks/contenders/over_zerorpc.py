# SPDX-License-Identifier: ZPL-2.1
"""zerorpc: msgpack over ØMQ, on gevent."""

import zerorpc

from contenders.base import ANY_PORT, TIMEOUT, Echo, Pair


class Zerorpc(Pair):
    """Its server and its client, as its documentation shows them."""

    def serve(self, tell):
        """Serve the methods of an object."""
        server = zerorpc.Server(Echo())
        [bound] = server.bind(ANY_PORT)
        tell(bound.addr)
        server.run()

    def connect(self, address):
        """Return a call of a client."""
        client = zerorpc.Client(timeout=TIMEOUT)
        client.connect(address)
        return client.echo
