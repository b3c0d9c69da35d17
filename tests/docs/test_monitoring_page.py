# SPDX-License-Identifier: ZPL-2.1
"""The page on monitoring has the paths and the metrics of the code, and only these."""

import re
from pathlib import Path

from pyramid.config import Configurator
from pyramid.interfaces import IRoutesMapper

PAGE = Path(__file__).parents[2] / 'docs' / 'howto' / 'monitoring.rst'
TEXT = PAGE.read_text(encoding='utf-8')


def test_paths_and_metrics():
    config = Configurator()
    config.include('pyams_zmq.health')
    config.include('pyams_zmq.metrics')
    config.commit()
    routes = config.registry.getUtility(IRoutesMapper).get_routes()
    assert {route.path for route in routes} == {*re.findall('/zmq/[a-z]+', TEXT)}
    names = {
        f'{metric.name}_total' if metric.type == 'counter' else metric.name
        for metric in config.registry.zmq_metrics.describe()
    }
    assert {*re.findall('^``(zmq_[a-z_]+)``', TEXT, re.MULTILINE)} == names
