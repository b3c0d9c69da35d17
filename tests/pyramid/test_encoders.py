# SPDX-License-Identifier: ZPL-2.1
"""Encoders that an application registers: the directive, its services, its workers."""

from functools import partial

import pytest
import transaction
from pyramid.config import Configurator
from pyramid.exceptions import ConfigurationConflictError, ConfigurationError

import encoded_values
from encoded_values import IParcel, Money, Parcel
from pool_checks import client_of, wait_for_workers
from pool_handlers import Pool
from pyams_zmq.message import decode_reply, encode
from pyams_zmq.testing import RecordingClient
from pyams_zmq.transaction import send_on_commit
from pyams_zmq.wire.values import find_decoder

PROGRAM = """
import sys
from pyams_zmq.cli import main
sys.argv[0] = 'worker.py'
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def pool(start):
    """Start a pool."""
    return partial(start, factory=Pool)


@pytest.fixture
def config():
    config = Configurator()
    config.include('pyams_zmq')
    return config


@pytest.fixture
def application(config):
    """An application with encoders."""
    config.include(encoded_values)
    config.commit()
    return config.registry


def test_directive(config):
    class Local:
        pass

    config.add_zmq_encoder(Local, lambda value: 'local', lambda data: Local())
    with pytest.raises(TypeError, match='Local has no JSON form'):
        encode(Local())
    config.commit()
    assert encode(Local()) == b'"local"'
    assert isinstance(find_decoder(Local)('local'), Local)
    [item] = config.introspector.get_category('ZMQ encoders')
    shown = item['introspectable']
    assert shown['type'] is Local
    assert shown.title == 'ZMQ encoder of Local'


def test_order_of_directives(config, caplog):
    """A handler that is declared first may need the decoder; the configuration has any order."""

    class Late:
        pass

    class Shelf:
        def put(self, late: Late):
            raise NotImplementedError

    config.add_zmq_process('shelf', handler=Shelf, address='127.0.0.1:25560', start='never')
    config.add_zmq_encoder(Late, str, Late)
    config.commit()
    assert not caplog.records


def test_dotted_names(application):
    assert decode_reply(encode([Money(5), Parcel()])) == [{'cents': 5}, 'parcel']
    assert find_decoder(Money)({'cents': 5}).cents == 5
    assert find_decoder(IParcel) is None


def test_conflict(config):
    config.include(encoded_values)
    config.add_zmq_encoder(Money, str)
    config.commit()  # the application overrides what it includes
    assert encode(Money(5)) == b'"Money(5)"'
    config.add_zmq_encoder(Parcel, str)
    config.add_zmq_encoder(Parcel, repr)
    with pytest.raises(ConfigurationConflictError):
        config.commit()


@pytest.mark.parametrize(
    ('args', 'text'),
    [
        (('no.such.type', str), "No module named 'no'"),
        ((Money, 'encoded_values.nothing'), 'nothing'),
        ((Money, 5), 'Bad encoder or decoder 5'),
        ((Money, str, 'encoded_values.__name__'), 'Bad encoder or decoder'),
        ((5, str), 'Bad type 5: write a class or an interface'),
        ((int, str), "<class 'int'> cannot have an encoder"),
    ],
)
def test_bad_arguments(config, args, text):
    with pytest.raises(ConfigurationError) as error:
        config.add_zmq_encoder(*args)
    assert str(error.value).startswith('add_zmq_encoder: ')
    assert text in str(error.value)


def test_all_clients(application):
    client = RecordingClient(replies={'ask': [200, Money(5)]})
    assert client.call('ask', {'price': Money(7)}) == {'cents': 5}
    client.send('note', Money(8))
    send_on_commit(client, 'later', Money(9))
    transaction.commit()
    assert [sent.args for sent in client.outbox] == [
        {'price': {'cents': 7}},
        {'cents': 8},
        {'cents': 9},
    ]


def test_service_has_the_encoders_of_its_application(application, start):
    process = start(handler=encoded_values.ShopMessageHandler, registry=application)
    with client_of(process) as client:
        assert client.call('price', Money(5)) == {'cents': 10}
        assert client.call('parcel') == 'parcel'


def test_worker_program_has_those_of_its_application(application, run_program, pool, tmp_path):
    process = pool(
        handler=encoded_values.ShopMessageHandler,
        workers=1,
        worker_address='127.0.0.1',
        worker_auth='worker:secret',
    )
    local = wait_for_workers(process, count=1)
    (tmp_path / 'auth').write_text('worker:secret')
    ini = tmp_path / 'app.ini'
    ini.write_text('[app:main]\nuse = call:encoded_values:make_app\n', encoding='utf-8')
    run_program(
        *('-W', 'ignore:pkg_resources is deprecated', '-c', PROGRAM, 'worker'),
        *(process.bound_worker_address, 'encoded_values.ShopMessageHandler', str(ini)),
        *('--auth-file', str(tmp_path / 'auth')),
    )
    [remote] = wait_for_workers(process, count=2) - local
    with client_of(process) as client:
        for _ in range(30):
            assert client.call('price', Money(5)) == {'cents': 10}
        assert remote in {client.call('pid') for _ in range(30)}
