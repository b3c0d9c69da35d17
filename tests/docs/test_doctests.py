# SPDX-License-Identifier: ZPL-2.1
"""The doctests of the package and of the specification.

The specification is not part of this package. Its doctest runs if the document is in
``../shared/spec`` or in the folder named by the environment variable ``PYAMS_ZMQ_SPEC``.
"""

import doctest
import os
import unittest
from pathlib import Path

import pyams_zmq

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ROOT = Path(__file__).parents[2]
SPEC = Path(os.environ.get('PYAMS_ZMQ_SPEC', ROOT.parent / 'shared' / 'spec'))

# pyams_utils 2.8 and later require this after cornice.
SWAGGER = '    >>> config.include("cornice_swagger")\n'


class DoctestTest(unittest.TestCase):
    """Run the documents as doctests."""

    def run_document(self, name, text):
        """Run a text as a doctest."""
        test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
        self.assertGreater(len(test.examples), 10)
        output = []
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append)
        self.assertEqual(result.failed, 0, ''.join(output))

    def test_package(self):
        """Run the README of the package."""
        path = Path(pyams_zmq.__path__[0]) / 'doctests' / 'README.rst'
        self.run_document('README.rst', path.read_text(encoding='utf-8'))

    @unittest.skipUnless(SPEC.is_dir(), 'the specification is not available')
    def test_specification(self):
        """Run the specification, unchanged but for the line that pyams_utils requires."""
        [path] = SPEC.glob('000_*.txt')
        lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
        index = next(i for i, line in enumerate(lines) if '>>> include_cornice(config)' in line)
        lines.insert(index + 1, SWAGGER)
        self.run_document(path.name, ''.join(lines))


def test_suite():
    """Return the suite for zope.testrunner."""
    return unittest.defaultTestLoader.loadTestsFromTestCase(DoctestTest)


test_suite.__test__ = False  # not a test for pytest
