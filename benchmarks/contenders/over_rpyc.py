# SPDX-License-Identifier: ZPL-2.1
"""RPyC, with a thread for each connection."""

import json

import rpyc
from rpyc.utils.server import ThreadedServer

from contenders.base import KIND, TIMEOUT, Pair, answer

LOCAL = '127.0.0.1'


class EchoService(rpyc.Service):
    """Answers JSON; for a dictionary RPyC returns a reference, which costs a call for each key."""

    def exposed_echo(self, request):
        """Answer a message."""
        return answer(request)


class RPyC(Pair):
    """Its server and its client, as its documentation shows them."""

    def serve(self, tell):
        """Serve."""
        server = ThreadedServer(EchoService, hostname=LOCAL, port=0)
        tell(server.port)
        server.start()

    def connect(self, address):
        """Return a call on a kept connection."""
        connection = rpyc.connect(LOCAL, address, config={'sync_request_timeout': TIMEOUT})
        echo = connection.root.echo

        def call(args):
            return json.loads(echo(json.dumps([KIND, args])))

        call.connection = connection  # keep a reference, or it is closed
        return call
