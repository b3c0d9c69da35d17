# SPDX-License-Identifier: ZPL-2.1
"""What ``config.include('pyams_zmq')`` adds to an application."""

import pytest
from pyramid.config import Configurator
from pyramid.i18n import make_localizer
from pyramid.interfaces import ITranslationDirectories
from pyramid.request import Request

import pyams_zmq
from pyams_zmq.client.connection import REFUSED
from pyams_zmq.client.socket import TIMEOUT
from pyams_zmq.include import include_package

BESIDE = [
    ['pyams_zmq'],
    ['pyams_zmq', 'pyams_zmq'],
    ['cornice', 'pyams_zmq'],
    ['cornice', 'cornice_swagger', 'pyams_utils', 'pyams_zmq'],
    ['pyams_zmq', 'cornice', 'cornice_swagger', 'pyams_utils'],
    ['cornice', 'cornice_swagger', 'pyams_zmq', 'pyams_utils', 'pyams_zmq'],
]


def hello(request):
    """View of the host application."""
    return {'message': request.localizer.translate(TIMEOUT)}


def make_config(*packages):
    """An application with a view."""
    config = Configurator(settings={'pyramid.default_locale_name': 'fr'})
    config.add_route('hello', '/hello')
    config.add_view(hello, route_name='hello', renderer='json')
    for package in packages:
        config.include(package)
    return config


def get(config, path):
    """Return the response of the application to a request."""
    return Request.blank(path).get_response(config.make_wsgi_app())


@pytest.mark.parametrize('packages', BESIDE, ids=' '.join)
def test_include(packages):
    config = make_config(*packages)
    assert get(config, '/hello').json == {'message': 'Délai de connexion dépassé'}
    assert get(config, '/other').status_int == 404


def test_include_after_commit():
    config = make_config()
    config.commit()
    config.include('pyams_zmq')
    assert get(config, '/hello').status_int == 200


@pytest.mark.parametrize('include', [pyams_zmq.includeme, include_package])
def test_direct_calls(include):
    config = make_config()
    include(config)
    include(config)
    assert get(config, '/hello').status_int == 200


def test_testing_configurator(config):
    """The testing configurator of Pyramid, which the doctests of the PyAMS packages use."""
    pyams_zmq.includeme(config)
    pyams_zmq.includeme(config)
    config.add_route('hello', '/hello')
    config.add_view(hello, route_name='hello', renderer='json')
    assert get(config, '/hello').json == {'message': 'Connection timeout'}


def test_nothing_else_is_registered():
    def discriminators(config):
        config.commit()
        return {
            (category, str(item['introspectable'].discriminator))
            for category, items in config.introspector.categorized()
            for item in items
        }

    added = discriminators(make_config('pyams_zmq')) - discriminators(make_config())
    assert {category for category, _discriminator in added} == {
        'translation directories',
        'request extensions',
        'subscribers',
    }


@pytest.mark.parametrize(
    ('locale', 'message', 'text'),
    [
        ('fr', TIMEOUT, 'Délai de connexion dépassé'),
        ('fr', REFUSED, 'Connexion refusée'),
        ('en', TIMEOUT, 'Connection timeout'),
        ('en', REFUSED, 'Connection refused'),
    ],
)
def test_translations(locale, message, text):
    config = make_config('pyams_zmq')
    config.commit()
    directories = config.registry.getUtility(ITranslationDirectories)
    assert make_localizer(locale, directories).translate(message).startswith(text)


def test_messages_compare_with_strings():
    assert [503, TIMEOUT] == [503, 'Connection timeout']
    assert TIMEOUT.domain == 'pyams_zmq'
