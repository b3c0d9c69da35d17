#
# Copyright (c) 2015-2026 Thierry Florac <tflorac AT ulthar.net>
# All Rights Reserved.
#
# This software is subject to the provisions of the Zope Public License,
# Version 2.1 (ZPL).  A copy of the ZPL should accompany this distribution.
# THIS SOFTWARE IS PROVIDED "AS IS" AND ANY AND ALL EXPRESS OR IMPLIED
# WARRANTIES ARE DISCLAIMED, INCLUDING, BUT NOT LIMITED TO, THE IMPLIED
# WARRANTIES OF TITLE, MERCHANTABILITY, AGAINST INFRINGEMENT, AND FITNESS
# FOR A PARTICULAR PURPOSE.
#

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
        """Keep a client."""
        client = zerorpc.Client(timeout=TIMEOUT)
        client.connect(address)
        return client.echo
