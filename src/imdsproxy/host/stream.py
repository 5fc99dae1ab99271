"""What a descriptor tells when it becomes readable, for who iterates over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Self, TypeVar

from imdsproxy.errors import DataplaneError

T = TypeVar("T")


class Stream(Generic[T]):
    """An asynchronous iterator, without an end, of what was told; it raises what failed meanwhile."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[T | DataplaneError] = asyncio.Queue()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        told = await self._told.get()
        if isinstance(told, DataplaneError):
            raise told
        return told

    def _tell(self, told: T) -> None:
        self._told.put_nowait(told)

    def _attempt(self, work: Callable[[], None]) -> None:
        """Work of an event loop's callback: what fails in there would only reach the loop's log."""
        try:
            work()
        except DataplaneError as error:
            self._told.put_nowait(error)
