# SPDX-License-Identifier: ZPL-2.1
"""The application for ASGI servers."""

from a2wsgi import WSGIMiddleware

from app.wsgi import application

asgi_application = WSGIMiddleware(application)
