# SPDX-License-Identifier: ZPL-2.1
"""Settings of the documentation: ``make docs``."""

import os
import sys
from importlib.metadata import version as version_of

project = 'PyAMS_zmq'
author = 'PyAMS contributors'
copyright = '2015-2026, PyAMS contributors'
release = version_of('pyams_zmq')
version = release.rpartition('.')[0]

extensions = [
    'repoze.sphinx.autointerface',
    'sphinx.ext.autodoc',
    'sphinx.ext.intersphinx',
    'sphinx.ext.viewcode',
]
exclude_patterns = ['_build']
default_role = 'code'
nitpicky = True
nitpick_ignore = [
    ('py:class', 'pyams_zmq.handler.job._T'),  # of an overloaded decorator
    ('py:class', 'pyams_zmq.outbox.storage.Storage'),  # applications have no storage of their own
    ('py:class', 'pyams_zmq.wire.tracing.Tracing'),  # `pyams_zmq.otel` has the only one
]

# Names of other projects. Without the network (the usual build) they stay plain text, without a
# warning: set DOCS_INTERSPHINX=1 to link them.
_ELSEWHERE = {
    'python': 'https://docs.python.org/3/',
    'pyramid': 'https://docs.pylonsproject.org/projects/pyramid/en/latest/',
    'zmq': 'https://pyzmq.readthedocs.io/en/latest/',
    'tornado': 'https://www.tornadoweb.org/en/stable/',
    'sqlalchemy': 'https://docs.sqlalchemy.org/en/20/',
}
if os.environ.get('DOCS_INTERSPHINX'):
    intersphinx_mapping = {name: (address, None) for name, address in _ELSEWHERE.items()}
else:
    _foreign = '|'.join(
        [*_ELSEWHERE, *sys.stdlib_module_names, 'prometheus_client', 'transaction', 'zope']
    )
    nitpick_ignore_regex = [(r'py:.*', rf'({_foreign})(\..*)?')]

# The documenter of interfaces is written for autodoc as it was before Sphinx 9.
autodoc_use_legacy_class_based = True
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
autodoc_preserve_defaults = True

html_theme = 'furo'
html_title = f'PyAMS_zmq {release}'
