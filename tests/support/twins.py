"""Instances that differ in nothing but what they may read, each asked for the same over a connection that is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from support.guest import IPV4, Connection, Lost, Reply


@dataclass(slots=True)
class Asker:
    """One who asks, over the same connection as long as it is left open.

    Attributes:
        kept: How many requests went over a connection that had been used before.
    """

    connect: Callable[[], Connection]
    kept: int = 0
    _connection: Connection | None = field(default=None)

    def ask(
        self,
        target: str,
        *,
        method: str = "GET",
        host: str = IPV4,
        headers: Sequence[str] = (),
    ) -> Reply:
        """The answer; over a new connection where the one before has been closed.

        Raises:
            Lost: There is none over a new connection either.
        """
        if self._connection is not None:
            try:
                reply = self._over(self._connection, target, method, host, headers)
            except Lost:
                # A server may close an idle connection at any time; a client asks again.
                self.close()
            else:
                self.kept += 1
                return reply
        self._connection = self.connect()
        return self._over(self._connection, target, method, host, headers)

    def _over(
        self, connection: Connection, target: str, method: str, host: str, headers: Sequence[str]
    ) -> Reply:
        reply = connection.request(target, method=method, host=host, headers=headers)
        if reply.closes:
            self.close()
        return reply

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def answers(
    askers: Mapping[str, Asker], target: str, *, method: str = "GET"
) -> Mapping[str, Reply]:
    """What each is told of one target."""
    return {name: asker.ask(target, method=method) for name, asker in askers.items()}
