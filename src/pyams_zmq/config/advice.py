# SPDX-License-Identifier: ZPL-2.1
"""What an error of a client adds to its text: the service, how it is started, the next step."""

import re
import shlex
from typing import Any

from pyams_zmq.exceptions import (
    ZMQBacklogError,
    ZMQBaseError,
    ZMQClosedError,
    ZMQJobError,
    ZMQMessageError,
    ZMQRefusedError,
    ZMQRemoteError,
    ZMQReplyError,
    ZMQTimeoutError,
    ZMQUnreachableError,
)

_STEPS: dict[type[ZMQBaseError], str] = {
    ZMQBacklogError: 'try again later; if that happens often, the service is too slow: raise '
    '{prefix}concurrency or {prefix}workers',
    ZMQTimeoutError: 'the method takes longer, or others before it do: raise {prefix}timeout, '
    '{prefix}concurrency or {prefix}workers',
    ZMQRefusedError: 'compare {prefix}client_auth (by default the first user of auth) or the keys '
    'with auth, curve and clients of the service',
    ZMQReplyError: 'check that a service of pyams_zmq listens at this address, and not another '
    'program; jobs need {prefix}journal',
    ZMQClosedError: 'get a new client, by request.zmq({name!r})',
    ZMQMessageError: 'send less, or raise {prefix}max_message_size',
}

_STORE = 'let the method store its result in a file, and return the path'
_COMPARE_ID = (
    'compare the id; jobs that have ended are kept for {prefix}keep days, and one that is '
    'submitted on commit is known after that'
)
_SET_JOURNAL = 'set {prefix}journal and {prefix}workers, and start the service again'

_REMOTE_STEPS = (
    (
        *(400, 'Bad (message|arguments of)|.* does not take a message of '),
        'compare the message with the parameters of the method',
    ),
    (400, r'Bad option \w+: write |The job cannot be written', 'correct what the text names'),
    (
        *(401, 'Your access was withdrawn'),
        'auth of the service has lost the user of this client: compare {prefix}client_auth',
    ),
    (403, '.* may not read the statistics', 'let the service allow it to this user'),
    (
        *(404, 'Unknown message type '),
        'compare the message with the public methods of the handler',
    ),
    (409, 'The job .* has no result', 'wait for its end, by request.zmq({name!r}).result(id)'),
    (
        *(410, 'The job .* was cancelled'),
        'somebody has cancelled the job: retry it, or submit another one',
    ),
    (413, 'Message is ', 'send less, or raise {prefix}max_message_size'),
    (413, 'The result of the job has ', _STORE),
    (500, 'Internal error', 'see the log of the service under this id'),
    (500, 'The reply is ', 'return less, or raise {prefix}max_reply_size'),
    (500, 'The result of a job cannot have binary frames', _STORE),
    (500, 'The message of the job is damaged', 'submit it again, and check the disk'),
    (500, 'The result could not be recorded', 'see the log of the service'),
    (500, '.* is a job, and was sent as a call', _SET_JOURNAL),
    (500, 'The journal cannot be read', 'see the log of the service, and check the disk'),
    (
        *(502, 'The worker .* during this job'),
        'see the log of the service: if the method ends its worker, mend it, then retry the job',
    ),
    (
        *(502, 'The worker '),
        'see the log of the service; a method that may run twice can be declared repeatable',
    ),
    (503, 'The service is stopping', 'try again later'),
    (
        *(503, 'The service is overloaded: .* wait for jobs'),
        'try again later; if that happens often, watch several jobs at once, or fewer',
    ),
    (
        *(503, 'The service is overloaded'),
        'try again later; if that happens often, raise {prefix}concurrency or {prefix}workers',
    ),
    (
        *(503, 'The disk of the journal is too slow'),
        'try again later; if that happens often, choose a faster disk for {prefix}journal',
    ),
    (504, 'The job .* has not ended after ', 'raise the timeout of submit, or that of zmq_job'),
    (
        *(504, '.* has not ended after |The deadline of the message '),
        'raise the timeout of the method, or {prefix}timeout for the deadline of the call',
    ),
    (504, 'The job .* has expired ', 'raise expires of the job, or {prefix}jobs'),
    (
        *(507, 'The journal cannot be written: its jobs take '),
        'raise {prefix}journal_size, or lower {prefix}keep: then restart the service',
    ),
    (
        *(507, 'The journal cannot be written'),
        'make room on the disk of {prefix}journal: then the service goes on by itself',
    ),
)
"""Replies that a service makes itself: status, start of the text, next step

A method may choose the same status, with a text of its own and for another reason.
"""

_JOB_STEPS = (
    (400, '', 'correct what the text names'),
    (403, '', 'ask on the machine of the service, or as a user of {prefix}stats_users'),
    (404, '.*"before"', 'ask for the first page again'),
    (404, '', _COMPARE_ID),
    (409, 'Another job with its key', 'wait for the end of the other one, or cancel it'),
    (409, '', 'ask for its state: request.zmq({name!r}).job(id).state'),
    (501, '', _SET_JOURNAL),
    *_REMOTE_STEPS,
)
"""Replies to questions about a job: status, start of the text, next step"""

_NOT_ENDED = 'Job .* has not ended within '
"""Start of the text of a ZMQTimeoutError about jobs"""


def advise(service: Any, error: ZMQBaseError, *, ini: str = '', problem: str = '') -> str:
    """Return where a service is, how it is started, and what to do about an error of its client.

    :param service: the declared service
    :param error: error of a call, or of a message
    :param ini: ini file of the application; empty if it is not known
    :param problem: why the service cannot start; empty if it is not known
    """
    return (
        f'Service {service.name!r} at {service.client_address} {_describe_start(service, ini)} '
        f'(start = {service.start}): {_next_step(service, error, problem)}'
    )


def _describe_start(service: Any, ini: str) -> str:
    if service.start == 'auto':
        return 'is started by the application when it serves requests'
    if service.start == 'external':
        return (
            f'is started by "pyams_zmq serve {shlex.quote(ini) if ini else "INI"} {service.name}"'
        )
    return 'runs elsewhere'


def _next_step(service: Any, error: ZMQBaseError, problem: str) -> str:
    if isinstance(error, ZMQUnreachableError) and not isinstance(error, ZMQBacklogError):
        return _next_step_of_start(service, problem, is_accepted=error.is_accepted)
    if isinstance(error, ZMQRemoteError):
        step = next(
            (
                step
                for status, text, step in (
                    _JOB_STEPS if isinstance(error, ZMQJobError) else _REMOTE_STEPS
                )
                if status == error.status and re.match(text, error.text)
            ),
            'its method has chosen this status',
        )
    elif isinstance(error, ZMQTimeoutError) and re.match(_NOT_ENDED, str(error)):
        step = 'it goes on: wait longer, or cancel it; {prefix}jobs is how many run at a time'
    else:
        step = next(
            (_STEPS[cls] for cls in type(error).__mro__ if cls in _STEPS),
            'see "When something goes wrong" in the documentation',
        )
    return step.format(prefix=f'pyams_zmq.{service.name}.', name=service.name)


def _next_step_of_start(service: Any, problem: str, *, is_accepted: bool) -> str:
    if problem:
        return f'it cannot start: {problem}'
    if service.start == 'auto':
        return 'check that the server of the application runs, and see its log'
    if service.start == 'external':
        if is_accepted:
            return 'see its log; stop it if it hangs, then run that'
        return 'run that, or see its log'
    return f'start it there, or correct pyams_zmq.{service.name}.address'
