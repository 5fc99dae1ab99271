"""Names of all objects that imdsproxy creates on a host; a later process recognises its objects by them."""

import hashlib
import re
from dataclasses import dataclass

from imdsproxy.model.entities import NetworkId

DEFAULT_PREFIX = "imds"

_DIGITS = 10
_LINK_BYTES = 15  # what the kernel allows (IFNAMSIZ without its NUL)
_PREFIX = re.compile(r"[a-z][a-z0-9]{0,6}\Z")


@dataclass(frozen=True, slots=True)
class Naming:
    """Names made of a prefix and a short hash of the network's id.

    Two daemons on one host with different prefixes never touch each other's objects.

    Attributes:
        prefix: 1 to 7 lower-case letters and digits, a letter first.

    Raises:
        ValueError: The prefix has another form.
    """

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not _PREFIX.match(self.prefix):
            raise ValueError(f"not a prefix of 1 to 7 letters and digits: {self.prefix!r}")

    @property
    def inner_device(self) -> str:
        """Veth end inside a namespace of ours; each is alone in its namespace, so all have the same name."""
        return f"{self.prefix}0"

    @property
    def protocol(self) -> int:
        """IFA_PROTO (1 to 255) that marks an address as added by us: 128 to 255.

        The kernel's own values are 1 to 3, and all other registered values are below 32.
        """
        return 128 + _hash(self.prefix)[0] % 128

    def namespace(self, network: NetworkId) -> str:
        return f"{self.prefix}-{self._digest(network)}"

    def link(self, network: NetworkId) -> str:
        """Return the name of the veth end that is attached to the bridge, at most 15 bytes."""
        return f"{self.prefix}{self._digest(network)}"

    def alias(self, network: NetworkId) -> str:
        """Return the ifalias of a network's devices, for people and for `owner_of`."""
        return f"imdsproxy:{self.prefix}:{network}"

    def owner_of(self, alias: str) -> NetworkId | None:
        """Return the network in an alias of ours; `None` for any other alias."""
        start = f"imdsproxy:{self.prefix}:"
        return NetworkId(alias.removeprefix(start)) if alias.startswith(start) else None

    def is_namespace(self, name: str) -> bool:
        return self._has_form(name, f"{self.prefix}-")

    def is_link(self, name: str) -> bool:
        return self._has_form(name, self.prefix)

    @property
    def _digits(self) -> int:
        return min(_DIGITS, _LINK_BYTES - len(self.prefix))

    def _digest(self, network: NetworkId) -> str:
        return _hash(network).hex()[: self._digits]

    def _has_form(self, name: str, start: str) -> bool:
        return re.fullmatch(f"{start}[0-9a-f]{{{self._digits}}}", name) is not None


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
