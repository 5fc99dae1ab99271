"""Values in several answers: networks that are not served, results of changes, readiness."""

from dataclasses import dataclass
from typing import Self

from imdsproxy.model.entities import NetworkId
from imdsproxy.network import planned


@dataclass(frozen=True, slots=True)
class NotServed:
    """A network that is configured and not served now.

    Attributes:
        code: Stable and kebab-case, as `namespace-missing`, `port-busy`, `foreign-listener`.
        reason: The reason, with pid and program if another program is in the way.
    """

    network: NetworkId
    code: str
    reason: str
    hint: str = ""

    @classmethod
    def of(cls, one: planned.NotServed) -> Self:
        family = "" if one.family is None else f"IPv{one.family.value}: "
        return cls(one.network, one.code.value, f"{family}{one.reason}", one.hint)


@dataclass(frozen=True, slots=True)
class Written:
    """Result of a change, sent once no worker of HAProxy answers with the previous state.

    Attributes:
        applied: HAProxy has the change. If false, the change is stored and takes effect once `pending` is resolved.
        pending: Reasons why the change is not in force yet, as `namespace n1 is missing`.
        warnings: Names in the records that documents change or lack; twenty at most, then how many more.
    """

    networks: int = 0
    instances: int = 0
    applied: bool = True
    pending: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Readiness:
    """Readiness: guests get what the sources report; for a hub, hosts get the state of etcd.

    Attributes:
        degraded: Configured networks that are not served, then faults that guests do not notice; a line each.
    """

    ready: bool
    reasons: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()
