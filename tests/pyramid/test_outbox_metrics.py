# SPDX-License-Identifier: ZPL-2.1
"""The messages of the outbox in the metrics, for each kind of database."""

from checks import wait_until


def test_outbox(make_application, services):
    application = make_application(**{'pyramid.includes': 'pyams_zmq.metrics'})
    services.start('converter')
    for kind, name in (('no', 'refused'), ('note', 'kept')):
        assert application.upload(name, type=kind) == 200
    services.wait_for('kept')
    wait_until(application.outbox.dead_letters)
    wait_until(lambda: not application.outbox.waiting())
    assert application.upload('later', to='renderer') == 200
    assert application.outbox.count_dead() == {'converter': 1}
    lines = application.get('/zmq/metrics').text.splitlines()
    assert 'zmq_outbox_up 1.0' in lines
    assert [line for line in lines if line.startswith('zmq_outbox_messages')] == [
        'zmq_outbox_messages{service="converter",state="waiting"} 0.0',
        'zmq_outbox_messages{service="converter",state="dead"} 1.0',
        'zmq_outbox_messages{service="renderer",state="waiting"} 1.0',
        'zmq_outbox_messages{service="renderer",state="dead"} 0.0',
    ]
