# SPDX-License-Identifier: ZPL-2.1
"""Messages sent on commit; public names of `pyams_zmq.client.transaction`."""

from pyams_zmq.client.transaction import Sender, send_on_commit, submit_on_commit

__all__ = ['Sender', 'send_on_commit', 'submit_on_commit']
