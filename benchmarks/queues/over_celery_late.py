# SPDX-License-Identifier: ZPL-2.1
"""Celery, with the settings against the loss of a job whose worker dies."""

from queues.over_celery import app, open_client

__all__ = ['app', 'open_client']

app.conf.task_acks_late = True
app.conf.task_reject_on_worker_lost = True
app.conf.broker_transport_options = {'visibility_timeout': 10}
