# SPDX-License-Identifier: ZPL-2.1
"""The page "When something goes wrong": its messages are those of the code, and none is missing."""

import ast
import re
from copy import deepcopy
from functools import cache
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyams_zmq.config.advice import advise
from pyams_zmq.exceptions import ZMQJobError, ZMQRemoteError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / 'src' / 'pyams_zmq'
PAGE = ROOT / 'docs' / 'howto' / 'troubleshooting.rst'

# Devices and transports are used without a service, and have pages of their own.
PACKAGES = tuple('client config handler jobs outbox pool process supervisor wire'.split())
LEVELS = ('error', 'warning', 'critical', 'exception')
ERRORS = re.compile(r'ZMQ\w*Error|ConfigurationError|LookupError')

UNLISTED = {
    'Unknown command …',  # between a process and its owner, of different versions
    'This process ends and cannot start others',  # for code that starts one meanwhile
    'Bad message of … frames',
    'Bad message: its options have more than … bytes',
    'Bad message: its options are not an object',
    'Bad message: it has … options; the limit is …',
    'Bad message: its option deadline is not a number, the seconds since the epoch',
    'ØMQ process … …',  # its parts are listed
    '… (setting …)',  # the same
}
"""Messages of which the text is enough"""


_OF_QUESTIONS = (400, 404, 409)
"""Status of which most replies are to questions about jobs"""


def text_of(node):
    """Return the text of an expression, with … for what is known at run time only."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r'%(\.\d+)?[srd]', '…', text)
        case ast.JoinedStr(values=values):
            return ''.join(text_of(each) for each in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return text_of(left) + text_of(right)
        case _:
            return '…'


class _Values(ast.NodeTransformer):
    """Replaces the names of variables by the values that a function, or a module, assigns."""

    def __init__(self, *scopes):
        self._values = {
            target.id: node.value
            for scope in scopes
            for node in ast.walk(scope)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def visit_Name(self, node):
        return self._values.get(node.id, node)


@cache
def replies():
    """Return status and text of the replies that services make themselves."""
    found = set()
    for package in PACKAGES:
        for path in (SOURCE / package).rglob('*.py'):
            tree = ast.parse(path.read_text(encoding='utf-8'))
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef):
                    values = _Values(tree, function)
                    found |= {(status, text) for status, text in replies_of(function, values)}
    return found


def replies_of(function, values):
    for node in ast.walk(function):
        match node:
            case ast.Call(
                func=ast.Name(id='encode'),
                args=[ast.List(elts=[ast.Constant(value=int(status)), text])],
            ):
                pass
            case ast.Call(
                func=ast.Name(id='ZMQMessageError'), args=[ast.Constant(value=int(status)), text]
            ):
                pass
            case _:
                continue
        text = simplify(text_of(values.visit(deepcopy(text))))
        if re.search(r'\w', text):
            yield status, text


def simplify(text):
    """Return a text in which several variable parts are one, without quotes and line breaks."""
    return re.sub(r"(…['.:]?)+(?=…)|'", '', ' '.join(text.split()))


@cache
def texts():
    """Return all texts of the code."""
    found = set()
    for path in SOURCE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.add(simplify(text_of(node)))
    return found


def messages():
    """Yield the messages of errors and log records."""
    for package in PACKAGES:
        for path in (SOURCE / package).rglob('*.py'):
            for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
                if isinstance(node, ast.Call) and node.args:
                    yield from message_of(node)
    yield from (text for status, text in replies() if status != HTTPStatus.OK)


def message_of(call):
    match call.func:
        case ast.Attribute(value=ast.Name(id='LOGGER'), attr=name) if name in LEVELS:
            number = 0
        case ast.Attribute(value=ast.Name(id='LOGGER'), attr='log'):
            number = 1
        case ast.Name(id=name) if ERRORS.fullmatch(name):
            number = len(call.args) - 1
        case ast.Attribute(value=ast.Name(id='self'), attr='_error'):  # of the settings
            number = 0
        case _:
            return
    text = simplify(text_of(call.args[number]))
    if re.search(r'\w', text):  # else it is that of another error
        yield text


def listed():
    """Return the messages of the page: the literals of each term of its lists."""
    terms = re.findall(r'^(``.+)\n    ', PAGE.read_text(encoding='utf-8'), re.MULTILINE)
    return [simplify(each) for term in terms for each in re.findall(r'``(.+?)``(?!`)', term)]


@pytest.mark.parametrize('message', listed())
def test_message_is_in_the_code(message):
    assert any(message in text or fits(message, text) for text in texts())


def fits(message, text):
    """Return True if a message of the page is one that a text of the code makes."""
    pattern = '.+'.join(map(re.escape, message.split('…')))
    return len(message) > 8 and re.search(pattern, text) is not None


@pytest.mark.parametrize('message', sorted({*messages()} - UNLISTED))
def test_message_is_on_the_page(message):
    page = listed()
    assert any(item in message or fits(item, message) or message in item for item in page)


@pytest.mark.parametrize(('status', 'text'), sorted(replies()))
def test_reply_has_a_step(status, text):
    """A client of a declared service says what to do about each reply that is not of a method."""
    service = SimpleNamespace(name='worker', client_address='tcp://h:1', start='never')
    errors = [ZMQJobError(status, text)]
    if status not in _OF_QUESTIONS:
        errors.append(ZMQRemoteError(status, text))
    for error in errors:
        assert not advise(service, error).endswith('its method has chosen this status')


def test_list_is_not_too_long():
    assert {simplify(text) for text in UNLISTED} <= {*messages()}
