from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.nova.settings import NovaUrl, parse_nova_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://192.0.2.10", NovaUrl("http", "192.0.2.10", 8775)),
        ("http://192.0.2.10/", NovaUrl("http", "192.0.2.10", 8775)),
        ("https://nova.example.org:443", NovaUrl("https", "nova.example.org", 443)),
        ("http://Nova:1", NovaUrl("http", "nova", 1)),
        ("HTTP://nova-1.", NovaUrl("http", "nova-1.", 8775)),
        ("http://[2001:DB8:0::5]:65535", NovaUrl("http", "2001:db8::5", 65535)),
        ("http://1and1", NovaUrl("http", "1and1", 8775)),
    ],
)
def test_a_url_is_scheme_host_and_port(text: str, url: NovaUrl) -> None:
    assert parse_nova_url(text) == url


_NO_NAME = f"http:// http://:80 http://a_b http://-a http://a..b http://a%20b http://{'a' * 64} http://{'a.' * 127}"
_REFUSED = {
    "has to begin with": "nova:8775 ftp://nova //nova",
    "user or password": "http://user@nova http://user:pw@nova http://:pw@nova",
    "end after the port": "http://nova/latest http://nova// http://nova? http://nova/?a=b http://nova#",
    "no TCP port": "http://nova:0 http://nova:",
    "is no URL": "http://nova:65536 http://nova:-1 http://nova:x http://[::1",
    "is no URL|not an IPv6 address": "http://[nova] http://[192.0.2.1]",
    "must not name a device": "http://[fe80::1%eth0]",
    "neither a name nor an address": _NO_NAME,
    "neither a name nor an address|is no URL": "http://2001:db8::5",
    "not an IPv4 address": "http://192.0.2 http://192.0.2.256 http://010.0.0.1 http://1234",
    "not ASCII": "http://növa",
    "would come back here": "http://169.254.169.254 http://[fe80::a9fe:a9fe]",
    "no address that can be connected to": "http://0.0.0.0 http://[::]",
}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has to begin with"),
        *((text, "blanks") for text in ("http://no va", "http://nova\n", "ht\ttp://nova")),
        *((text, why) for why, texts in _REFUSED.items() for text in texts.split()),
    ],
)
def test_what_is_no_place_of_an_api_is_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_nova_url(text)


@given(
    st.sampled_from(["http", "https"]),
    st.ip_addresses().map(lambda one: f"[{one}]" if one.version == 6 else str(one))
    | st.from_regex(r"[a-z][a-z0-9]{0,10}(\.[a-z0-9]{1,10}){0,3}", fullmatch=True),
    st.integers(1, 65535),
)
def test_a_url_is_written_as_it_is_read(scheme: str, host: str, port: int) -> None:
    try:
        url = parse_nova_url(f"{scheme}://{host}:{port}")
    except ValueError:
        return
    assert parse_nova_url(str(url)) == url
