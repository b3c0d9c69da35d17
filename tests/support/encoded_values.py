# SPDX-License-Identifier: ZPL-2.1
"""An application with values of its own, and a service that takes and returns them."""

import os

from pyramid.config import Configurator
from zope.interface import Interface, implementer

from pyams_zmq.handler import ZMQMessageHandler


class Money:
    """A value without a JSON form of its own."""

    def __init__(self, cents):
        self.cents = cents

    def __str__(self):
        return f'Money({self.cents})'


class IParcel(Interface):
    """A parcel."""


@implementer(IParcel)
class Parcel:
    """Is encoded by its interface."""


def encode_money(value):
    return {'cents': value.cents}


def decode_money(data):
    return Money(data['cents'])


def encode_parcel(value):
    return 'parcel'


class Shop:
    """Returns values."""

    def price(self, money: Money):
        return [200, Money(2 * money.cents)]

    def pid(self):
        return os.getpid()

    def parcel(self):
        return Parcel()


class ShopMessageHandler(ZMQMessageHandler):
    """Serves Shop."""

    handler = Shop


def includeme(config):
    name = 'encoded_values'
    config.add_zmq_encoder(f'{name}.Money', f'{name}.encode_money', f'{name}.decode_money')
    config.add_zmq_encoder(f'{name}.IParcel', f'{name}.encode_parcel')


def make_app(global_config, **settings):
    config = Configurator(settings=settings)
    config.include('pyams_zmq')
    config.include(includeme)
    return config.make_wsgi_app()
