# SPDX-License-Identifier: ZPL-2.1
"""Services of an application with jobs."""

from pathlib import Path

import pytest
from pyramid.exceptions import ConfigurationError

from job_handlers import Jobs
from pyams_zmq.config import services_of
from pyams_zmq.pool import ZMQPool


class Calls:
    """A method that is not a job."""

    def echo(self, args):
        return [200, args]


def declare(config, **options):
    config.include('pyams_zmq')
    config.add_zmq_process('converter', **{'address': '127.0.0.1:6666', 'handler': Jobs, **options})
    config.commit()
    return services_of(config.registry)['converter']


def test_settings_of_jobs(config, tmp_path):
    names = {'workers': '4', 'journal': str(tmp_path / 'x.jobs'), 'jobs': '3', 'keep': '2.5'}
    names['journal_size'] = '100000'
    settings = {f'pyams_zmq.converter.{name}': value for name, value in names.items()}
    config.registry.settings.update(settings)
    process = declare(config, start='external').make_process(config.registry)
    assert isinstance(process, ZMQPool)
    assert process.journal == Path(tmp_path / 'x.jobs')
    assert (process.jobs, process.keep, process.cancel_grace) == (3, 2.5, 10.0)
    assert process.journal_size == 100_000


@pytest.mark.parametrize('options', [{'workers': 2}, {}])
def test_handler_with_jobs_needs_a_journal(config, options):
    with pytest.raises(ConfigurationError, match='add is a job .*set workers and journal'):
        declare(config, start='external', **options)


def test_service_that_runs_elsewhere(config):
    assert declare(config, start='never').handler is Jobs


def test_journal_needs_a_pool(config, tmp_path):
    with pytest.raises(ConfigurationError, match='has journal, which is for a pool: set .*workers'):
        declare(config, start='external', journal=str(tmp_path / 'x.jobs'))


def test_class_of_a_pool_with_a_journal(config, tmp_path):
    factory = type('Own', (ZMQPool,), {'journal': tmp_path / 'x.jobs'})
    assert declare(config, start='external', workers=2, factory=factory).factory is factory


@pytest.mark.parametrize('name', ['jobs', 'keep', 'cancel_grace'])
def test_options_of_jobs_need_a_journal(config, name):
    text = f'has {name}, which is for jobs: set .*pyams_zmq.converter.journal'
    with pytest.raises(ConfigurationError, match=text):
        declare(config, start='external', workers=2, handler=Calls, **{name: 1})


def test_options_of_jobs_with_the_journal_of_a_class(config, tmp_path):
    factory = type('Own', (ZMQPool,), {'journal': tmp_path / 'x.jobs'})
    assert declare(config, start='external', workers=2, factory=factory, keep=1).limits['keep'] == 1
