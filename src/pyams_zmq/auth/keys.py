# SPDX-License-Identifier: ZPL-2.1
"""Public keys that are not listed: those that a function accepts, and all keys."""

from collections.abc import Awaitable
from typing import Any


class AnyKey:
    """Contains every key: a client with any key may connect."""

    def __contains__(self, key: object) -> bool:
        return True


class AskedKeys:
    """Keys that a function accepts; contains those that it has accepted when it was last asked.

    :param domain: first argument of the function
    :param provider: object with a method ``callback(domain, key)``, where *key* is the public key
        (Z85, bytes); it returns true, or an awaitable of it, if a client with this key may connect
    :raises TypeError: for another object
    :ivar provider: the object
    """

    def __init__(self, domain: str, provider: Any):
        if not callable(getattr(provider, 'callback', None)):
            raise TypeError(f'A {type(provider).__name__} has no method callback(domain, key)')
        self._domain = domain
        self.provider = provider
        self._accepted: set[object] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._accepted

    def ask(self, key: str) -> bool:
        """Return True if a client with this key may connect now."""
        self._accepted.discard(key)  # if the function fails, too
        accepted = self.provider.callback(self._domain, key.encode())
        if isinstance(accepted, Awaitable):
            import asyncio  # noqa: PLC0415 - clients import this module, and seldom need asyncio

            accepted = asyncio.run(_result_of(accepted))
        if accepted:
            self._accepted.add(key)
        return bool(accepted)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
