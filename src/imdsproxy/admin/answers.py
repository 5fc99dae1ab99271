"""What answers say of networks that are not served, and of changes."""

from dataclasses import dataclass
from typing import Self

from imdsproxy.core import endpoints
from imdsproxy.core.model import NetworkId


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A network that is configured and not served now.

    Attributes:
        code: Stable and kebab-case, as `namespace-missing`, `port-busy`, `foreign-listener`.
        reason: What is wrong, with pid and program where another program is in the way.
        hint: What the operator can do.
    """

    network: NetworkId
    code: str
    reason: str
    hint: str = ""

    @classmethod
    def of(cls, one: endpoints.LeftOut) -> Self:
        """As reports have it."""
        family = "" if one.family is None else f"IPv{one.family.value}: "
        return cls(one.network, one.code.value, f"{family}{one.reason}", one.hint)


@dataclass(frozen=True, slots=True)
class Written:
    """What a change did: acknowledged once no worker of HAProxy answers with the old state.

    Attributes:
        applied: HAProxy has it. Off: it is stored, and comes in force when `pending` is mended.
        pending: Why it is not in force yet, as `namespace n1 is missing`.
        warnings: Names in the records that documents change or lack; twenty at most, then how many more.
    """

    networks: int = 0
    instances: int = 0
    applied: bool = True
    pending: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether guests get what the sources say; of a hub, whether hosts get what etcd has.

    Attributes:
        reasons: Why not, a line each.
        degraded: Networks that are configured and not served, then what is wrong and no guest notices; a line each.
    """

    ready: bool
    reasons: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()
