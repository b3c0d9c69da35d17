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
        """Keep a proxy."""
        proxy = api.Proxy(address)
        proxy._pyroTimeout = TIMEOUT
        return proxy.echo
