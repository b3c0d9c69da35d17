# SPDX-License-Identifier: ZPL-2.1
"""The package's story, and the one of the specification, run as doctests.

The specification is not part of this package: its story runs where the document is at hand,
in ``../shared/spec`` or in the folder named by the environment variable ``PYAMS_ZMQ_SPEC``.
"""

import doctest
import os
import unittest
from pathlib import Path

import pyams_zmq

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ROOT = Path(__file__).parents[2]
SPEC = Path(os.environ.get('PYAMS_ZMQ_SPEC', ROOT.parent / 'shared' / 'spec'))

# What pyams_utils 2.8 and later want of everybody, right after cornice.
SWAGGER = '    >>> config.include("cornice_swagger")\n'


class StoryTest(unittest.TestCase):
    """Run the stories."""

    def run_story(self, name, text):
        """Run a text as a doctest."""
        test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
        self.assertGreater(len(test.examples), 10)
        output = []
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=output.append)
        self.assertEqual(result.failed, 0, ''.join(output))

    def test_story(self):
        """The package's own story."""
        path = Path(pyams_zmq.__path__[0]) / 'doctests' / 'README.rst'
        self.run_story('README.rst', path.read_text(encoding='utf-8'))

    @unittest.skipUnless(SPEC.is_dir(), 'the specification is not at hand')
    def test_specification(self):
        """The story of the specification, as it stands."""
        [path] = SPEC.glob('000_*.txt')
        lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
        index = next(i for i, line in enumerate(lines) if '>>> include_cornice(config)' in line)
        lines.insert(index + 1, SWAGGER)
        self.run_story(path.name, ''.join(lines))


def test_suite():
    """Suite for zope.testrunner."""
    return unittest.defaultTestLoader.loadTestsFromTestCase(StoryTest)


test_suite.__test__ = False  # it is no test of pytest's
