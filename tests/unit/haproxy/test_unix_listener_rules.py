"""Which spellings of an address the rules let HAProxy read; what it makes of them is tested with HAProxy."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imdsproxy.core.haproxy.model import UnixBind
from support.haproxy_config import SPEC, read_rules

_SPEC = replace(SPEC, unix=UnixBind("/run/a", "0600", 0, 0))
_RULES = [line for line in read_rules(_SPEC, "frontend agents") if line[0] == "http-request"]
_LINES = [" ".join(line) for line in _RULES]


def _pattern(variable: str, source: str) -> re.Pattern[str]:
    """The regular expression under which a variable is set."""
    (line,) = (
        one
        for one in _RULES
        if one[1] == f"set-var({variable})" and source in one[2] and "reg" in one
    )
    return re.compile(line[-2])


_IPV4 = _pattern("sess.address", "var(txn.peer)")
_IPV6 = _pattern("txn.ipv6", "var(txn.peer)")


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _is_ipv4(text: str) -> bool:
    address = _parsed(text)
    return isinstance(address, IPv4Address) or getattr(address, "ipv4_mapped", None) is not None


@given(st.ip_addresses())
def test_every_address_as_a_kernel_spells_it_is_read_as_what_it_is(
    address: IPv4Address | IPv6Address,
) -> None:
    text = str(address)
    assert bool(_IPV4.search(text)) == _is_ipv4(text)
    assert bool(_IPV4.search(text) or _IPV6.search(text))


@given(st.ip_addresses(v=4), st.sampled_from(["{}", "0{}", "::{}", "0::ffff:{}", "::ffff:0:{}"]))
@example(IPv4Address("10.0.0.5"), "0:0:0:0:0:0:{}")
def test_only_a_mapped_address_is_taken_for_ipv4(address: IPv4Address, form: str) -> None:
    text = form.format(address)
    assert bool(_IPV4.search(text)) == _is_ipv4(text)


@given(st.text("0123456789abfF:.,/% []", max_size=30))
@example("1.2.3.4, 1.2.3.5")
@example("::ffff:1.2.3.4\n")
@example("0:0:0:0:0:0:0:ffff:1:2")
def test_what_is_taken_for_ipv4_is_an_ipv4_address_or_none_at_all(text: str) -> None:
    # HAProxy reads what is let through strictly, but for what only IPv4 has.
    if _IPV4.search(text) and _parsed(text) is not None:
        assert _is_ipv4(text)
    if _IPV4.search(text) and ":" not in text:
        assert isinstance(_parsed(text), IPv4Address)


@pytest.mark.parametrize("text", ["", "1.2.3.4,", "::1,::2", "::1%eth0", "[::1]", "a b", "::1/64"])
def test_what_is_no_address_alone_is_not_read_at_all(text: str) -> None:
    assert not _IPV4.search(text)
    assert not _IPV6.search(text)
