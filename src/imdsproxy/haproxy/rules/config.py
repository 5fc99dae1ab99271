"""Complete configuration of a `DataplaneSpec`.

The order inside a frontend is the order of evaluation. Expensive rules stand behind `cache-use`, which answers repeated
reads.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from imdsproxy.haproxy.rules.backends import names_of_backends
from imdsproxy.haproxy.rules.counting import read_counter
from imdsproxy.haproxy.rules.frontends import names_of_frontends
from imdsproxy.haproxy.rules.limits import names_of_limits
from imdsproxy.haproxy.rules.model import DataplaneSpec, count_namespaces
from imdsproxy.haproxy.rules.names import CONSTANTS
from imdsproxy.haproxy.rules.nova import names_of_nova, nova_backends
from imdsproxy.haproxy.rules.request_log import names_of_log
from imdsproxy.haproxy.rules.text import (
    Text,
    Value,
    fill_sections,
    name_values,
    option,
    read_template,
    render,
)

_SHORT_PER_MB: Final = 256
"""Short documents per MiB of the cache: an entry with its key is below 1 kB."""


def render_config(spec: DataplaneSpec) -> str:
    """Render the configuration file: equal for equal specs, whatever the order of their binds."""
    return render(_sections(spec, CONSTANTS | _values(spec)))


def _sections(spec: DataplaneSpec, values: dict[str, Value]) -> Iterator[str]:
    for name in ("global", "limits", "cache", "request_log", "frontends", "backends", "probe"):
        yield from fill_sections(read_template(name), values)
    yield from nova_backends(spec, values)
    for name in ("counting", "exporter"):
        yield from fill_sections(read_template(name), values)


def _values(spec: DataplaneSpec) -> dict[str, Value]:
    """Return the names for templates in addition to `CONSTANTS`: fields of `Limits`, paths, and derived values."""
    sizes = spec.limits
    namespaces = count_namespaces((*spec.binds, *spec.unverified))
    by_chance = f"{{ rand({spec.count_reads}) 0 }}" if spec.count_reads > 1 else ""
    return (
        name_values(asdict(sizes))
        | name_values(spec.paths.named)
        | names_of_limits(sizes)
        | names_of_log(spec)
        | names_of_frontends(spec)
        | names_of_backends(spec)
        | names_of_nova(spec)
        | {
            "nova": bool(spec.nova),
            "fleet": spec.fleet,
            # `find_whose_keys` sets the variable only for instances with keys of their own.
            "whose_keys": Text(",concat(,txn.whose_keys)" if spec.fleet else ""),
            "cache": sizes.cache_mb > 0,
            "counts_reads": spec.count_reads > 0,
            # With Nova, most requests are not for our documents.
            "keeps_short": sizes.cache_mb > 0 and not spec.nova,
            "short_slots": sizes.cache_mb * _SHORT_PER_MB,
            "largest_cached": min(sizes.max_object_bytes, sizes.cache_mb * 1024 * 1024 // 2),
            "pipes": (namespaces + 1) // 2 or None,
            "chroot": spec.paths.chroot,
            "user": option("user", spec.user),
            "group": option("group", spec.group),
            # Excludes requests that `policy_share` counts.
            "without_own_limits": Text(f"!{CONSTANTS['has_own_limits']}" if sizes.fair else ""),
            # The random choice of the reads without a token that are counted.
            "by_chance": Text(by_chance),
            "unless_by_chance": Text(f"!{by_chance}" if spec.count_reads else ""),
            "unless_checked": Text(f"!{CONSTANTS['needs_check']}"),
            "unless_sampled": Text(f"!{CONSTANTS['needs_check']}" if spec.count_reads else ""),
            "counts_all": spec.count_reads == 1,
            "samples_left": spec.count_reads > 1 and not spec.nova,
            "read_counter": read_counter(spec.count_reads),
            "documents": bool(spec.paths.documents),
            "exporter": spec.exporter,
        }
    )
