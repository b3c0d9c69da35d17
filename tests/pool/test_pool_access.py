# SPDX-License-Identifier: ZPL-2.1
"""Access rules of a pool: its broker has them; a worker that sets one gets an error."""

import pytest
from zmq.auth import CURVE_ALLOW_ANY
from zope.interface.interfaces import IMethod

from pool_checks import TIMEOUT, client_of
from pool_handlers import Pool, PoolHandler, PoolMessageHandler
from pyams_zmq.curve import CurveServer
from pyams_zmq.exceptions import ZMQRemoteError, ZMQStartError
from pyams_zmq.interfaces import IZMQProcess
from pyams_zmq.pool import PoolWorker, ZMQPool

HERE, ELSEWHERE = '127.0.0.1', '192.0.2.1'
NO_RULES = 'The broker of a pool decides who may connect, not a worker: pass auth, clients'
USERS = {'editor': 'new'}


class Provider:
    """Accepts no key."""

    def callback(self, domain, key):
        return False


RULES = {
    'allow': lambda worker: worker.auth_thread.allow(ELSEWHERE),
    'deny': lambda worker: worker.auth_thread.deny(HERE),
    'configure_plain': lambda worker: worker.auth_thread.configure_plain('*', USERS),
    'own domain': lambda worker: worker.auth_thread.configure_plain('pyams_zmq', USERS),
    'configure_curve': lambda worker: worker.auth_thread.configure_curve('*', CURVE_ALLOW_ANY),
    'callback': lambda worker: worker.auth_thread.configure_curve_callback('*', Provider()),
    'policy': lambda worker: worker.auth_thread.policy.deny(HERE),
    'access': lambda worker: worker.access.set_clients(ELSEWHERE),
    'clients': lambda worker: setattr(worker, 'clients', ELSEWHERE),
    'passwords': lambda worker: setattr(worker, 'passwords', USERS),
}


class RuleHandler(PoolHandler):
    """Sets a rule in its process."""

    def rule(self, name):
        try:
            RULES[name](self.process)
        except ZMQStartError as error:
            return [403, str(error)]
        return [200, 'accepted']


class RuleMessageHandler(PoolMessageHandler):
    """Serves RuleHandler."""

    handler = RuleHandler


def test_rules_in_a_handler(pool):
    """They would protect nothing: the clients are connected to the broker."""
    process = pool(handler=RuleMessageHandler, workers=1)
    with client_of(process) as client:
        for name in RULES:
            with pytest.raises(ZMQRemoteError, match=NO_RULES) as caught:
                client.call('rule', name)
            assert caught.value.status == 403, name
        assert client.call('echo', 1) == 1


class RuleWorker(PoolWorker):
    """Sets a rule when it starts."""

    rule = 'deny'

    def setup(self):
        super().setup()
        RULES[self.rule](self)


@pytest.mark.parametrize('rule', RULES)
def test_rules_in_the_setup_of_a_worker(rule):
    """The pool does not become ready."""
    process = Pool(workers=1)
    process.worker_factory = type('Worker', (RuleWorker,), {'rule': rule})
    process.start()
    with pytest.raises(ZMQStartError, match=NO_RULES):
        process.wait_ready()
    process.join(TIMEOUT)
    assert process.exitcode == 1


def make_worker(cls=PoolWorker):
    return cls('127.0.0.1:5000', PoolMessageHandler, 'worker:secret')


@pytest.mark.parametrize('name', ['clients', 'passwords'])
def test_rules_that_are_assigned_before_the_start(name):
    with pytest.raises(ZMQStartError, match=NO_RULES):
        RULES[name](make_worker())


def test_rules_of_the_class_of_a_worker(keys):
    curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    with pytest.raises(ZMQStartError, match=NO_RULES):
        make_worker(type('Worker', (PoolWorker,), {'curve': curve}))
    with pytest.raises(TypeError, match='Worker.clients is a class attribute'):
        make_worker(type('Worker', (PoolWorker,), {'clients': ELSEWHERE}))
    worker = make_worker()
    with pytest.raises(ZMQStartError, match=NO_RULES):
        worker.set_access(None, ELSEWHERE, None)
    with pytest.raises(ZMQStartError, match=NO_RULES):
        worker.set_access('editor:secret', None, None)


class AssigningWorker(PoolWorker):
    """Assigns a rule in its constructor."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.clients = ELSEWHERE


def test_rules_in_the_constructor_of_a_worker():
    """The pool does not become ready; its log has the error."""
    process = Pool(workers=1)
    process.worker_factory = AssigningWorker
    process.start()
    with pytest.raises(ZMQStartError, match='Pool.* worker 1 fails, see its log'):
        process.wait_ready()
    process.stop()


def test_rules_of_a_pool(pool, ask):
    """Those that are assigned before the start are followed."""
    process = Pool(workers=1)
    process.passwords = 'editor:old'
    process.passwords['editor'] = 'new'
    process = pool(factory=lambda: process)
    assert ask(process, ['echo', 1], auth='editor:new') == [200, 1]
    assert ask(process, ['echo', 1], auth='editor:old')[0] == 401
    with pytest.raises(TypeError, match='does not support item assignment'):
        process.passwords['editor'] = 'newer'
    process = Pool(workers=1)
    process.clients = ELSEWHERE
    process = pool(factory=lambda: process)
    assert ask(process, ['echo', 1])[0] == 401


def test_keys_that_are_assigned_to_a_pool(keys):
    process = Pool(workers=1)
    process.curve = CurveServer(keys / 'broker.key_secret', keys / 'workers')
    with pytest.raises(ZMQStartError, match='Pool.curve comes too late'):
        process.start()


# What a pool does not call

HOOKS = {
    name for name, item in IZMQProcess.namesAndDescriptions() if IMethod.providedBy(item)
} - set(dir(ZMQPool))


@pytest.mark.parametrize('name', [*sorted(HOOKS), 'socket_type', '_on_started', '_drain'])
def test_hooks_of_a_process(name):
    """A subclass of a pool that has one is refused, because its rules would be ignored."""
    assert {'setup', 'init_stream'} <= HOOKS
    text = f'Guarded.{name} would be ignored, .* define it in a subclass of PoolWorker'
    with pytest.raises(TypeError, match=text):
        type('Guarded', (ZMQPool,), {name: print})
    mixin = type('Mixin', (), {name: print})
    with pytest.raises(TypeError, match=text):
        type('Guarded', (mixin, Pool), {})


def test_workers_as_a_class_attribute():
    """The constructor would replace it by its default."""
    with pytest.raises(TypeError, match=r'Two\.workers .* Two\(address, handler, workers=2\)'):
        type('Two', (ZMQPool,), {'workers': 2})
