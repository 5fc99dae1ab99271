from __future__ import annotations

import pytest

from imdsproxy.config.section import parse_endpoint


@pytest.mark.parametrize("text", ["127.0.0.1:9465", "[::1]:1", "192.0.2.7:65535"])
def test_an_endpoint_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_endpoint(text)) == text
    assert "[" not in parse_endpoint(text).host


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.0.0.1", "no port"),
        ("127.0.0.1:", "no port"),
        ("127.0.0.1:x", "no port"),
        ("127.0.0.1:0", "not a TCP port"),
        ("127.0.0.1:65536", "not a TCP port"),
        ("localhost:80", "not an IP address"),
        ("::1:80", "brackets"),
        ("[127.0.0.1]:80", "brackets"),
        ("169.254.169.254:80", "link-local"),
        ("[fe80::a9fe:a9fe]:80", "link-local"),
        ("0.0.0.0:80", "everywhere"),
        ("[::]:80", "everywhere"),
        ("224.0.0.1:80", "multicast"),
        ("127.0.0.1:²", "no port"),
    ],
)
def test_what_guests_could_reach_or_nobody_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_endpoint(text)
