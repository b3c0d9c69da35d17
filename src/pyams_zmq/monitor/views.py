# SPDX-License-Identifier: ZPL-2.1
"""Routes and views for programs that watch the application."""

from collections.abc import Callable
from typing import Any

from pyramid.response import Response
from pyramid.security import NO_PERMISSION_REQUIRED


def add_page(config: Any, name: str, path: str, view: Callable[[Any], Response]) -> None:
    """Add a page for GET and HEAD that everybody may read, and that no cache keeps.

    :param config: the configurator
    :param name: name of the route
    """

    def show(request: Any) -> Response:
        response = view(request)
        response.cache_control = 'no-store'
        return response

    # Not the root of the application, which may open a database.
    config.add_route(name, path, factory=_Root)
    config.add_view(
        show,
        route_name=name,
        request_method='GET',
        permission=NO_PERMISSION_REQUIRED,  # not the default permission of the application
    )


class _Root:
    """The context of these pages."""

    def __init__(self, request: Any):
        self.request = request
