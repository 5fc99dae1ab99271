"""Ways to write the path of a document down, so that whoever serves it may take one for another.

None of them is right or wrong in itself: a test asks for each where nothing is refused, and whatever is answered
there must be refused where the document is. Sources: RFC 3986 §2.1, §3.3, §5.2.4 and §6; RFC 9112 §3.2; RFC 3629 §3
(no overlong forms); Nova's `nova/api/metadata/base.py` (`lookup`), which takes `posixpath.normpath` of what WSGI has
unescaped once.
"""

from collections.abc import Iterator
from typing import Final

from hypothesis import strategies as st


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PATHS: Final = _words(
    r"""
    / /latest /latest/ /latest/meta-data/ /latest/meta-data/hostname /latest/meta-data/local-ipv4
    /latest/meta-data/public-keys/0/openssh-key /latest/user-data /1.0/user-data /2009-04-04/meta-data/hostname
    /2009-04-04/user-data /openstack /openstack/latest /openstack/latest/meta_data.json /openstack/latest/user_data
    /openstack/latest/network_data.json /openstack/2012-08-10/meta_data.json /openstack/2012-08-10/user_data
    /openstack/latest/password /nocloud /nocloud/meta-data /nocloud/user-data
    """
)
"""Documents and listings of every tree, as their clients write them."""

_SLASHES: Final = _words(
    r"""
    // /// /./ /././ /.// //./ /%2e/ /%2E// %2f %2F /%2f %2F/ %2f.%2f %252f \ /\ %5c /x/../ /x/%2e%2e/ /x/.%2e/
    /x%2f..%2f /x/y/../../ /x/..;/ /;/ /;x/ /.;/ ;/ /%00/ /%20/ %c0%af /%c0%ae/ %e0%80%af /%e2%88%95/ /ec2/ /%09 /+
    """
)
"""In place of a slash."""

_HEADS: Final = _words(
    r"""
    /ec2 /EC2 /ec%32 /%65c2 //ec2 /./ec2 /ec2/. /ec2/ /ec2// /ec2/ec2 /ec2%2f %2fec2 /%2fec2 /%2e/ec2 /ec2/.. /x/..
    /x/%2e%2e /.. /../.. /%2e%2e /.%2e/ /. / // %2f %2f%2f /openstack/.. /openstack/%2e%2e /openstack%2f..
    /openstack/latest/../.. /openstack/x/../../ec2 /nocloud/.. /nocloud/%2E%2E/. /latest/.. /latest/../ec2
    /latest/api/token/../../.. /openstack/content/.. http://169.254.169.254 http://169.254.169.254:80/
    HTTP://openstack https://nocloud http://openstack/openstack/.. http://a@b:1 http:// http:/ http: x://y/
    x://y/ec2 //openstack ///openstack/.. /;x /%00 /%c0%ae%c0%ae \ /\ ? /?
    """
)
"""Before a path."""

_TAILS: Final = _words(
    r"""
    / // /. /./ /%2e %2f %2F%2e /.. /x/.. /x/%2e%2e /x /x/y /user-data /../user-data /.x . .. %2e ? ?x
    ?x=/openstack/latest/meta_data.json ?/nocloud/ ?? %3f %3Fx ?%00 ; ;x ;x=/openstack /; /;x %3b %00 %00.json /%00
    %20 %0a %0d%0a % %zz %2 %u002f + %23 \ /\ %5c %c0%af %ff %c3%a4 ~ * /* & =
    """
)
"""Behind a path."""

_VERSIONS: Final = _words(
    r"""
    latest LATEST Latest 1.0 2007-01-19 2009-04-04 2021-01-03 2024-04-11 9999-12-31 2012-08-10 2018-08-27 2025-04-04
    1999-01-01 2009-4-4 2009-04-04. 0 x ec2 openstack meta-data .latest latest.
    """
)
"""In place of a version; most there are not."""


_CHOSEN: Final = (
    *("/latest/user-data", "/2009-04-04/meta-data/hostname", "/latest/meta-data/"),
    *("/openstack/latest/user_data", "/openstack/latest", "/nocloud/user-data"),
)
_OTHERS: Final = (
    *("/latest/user%2ddata", "/%6catest/user-data", "/latest/user-data?x=/openstack/"),
    *(
        "http://openstack/latest/user-data",
        "/ec2//2009-04-04/user-data",
        "/openstack/..%2flatest/user-data",
    ),
)


def _by_hand() -> Iterator[str]:
    yield from PATHS
    yield from _OTHERS
    for path in _CHOSEN:
        for head in _HEADS:
            yield head + path
        for tail in _TAILS:
            yield path + tail
    for path in (one for one in _CHOSEN if one.endswith("data")):
        for slash in _SLASHES:
            yield path[0] + path[1:].replace("/", slash)
            yield path.replace("/", slash, 1)
        for version in _VERSIONS:
            yield path.replace("latest", version)
            yield f"/ec2{path.replace('latest', version)}"
        yield path.upper()
        yield path.title()
        yield path[1:]
        for escape in ("%%%02x", "%%%02X", "%%25%02x"):
            yield "/" + "".join(escape % ord(letter) for letter in path[1:])
        yield "".join(f"%{ord(letter):02X}" for letter in path)
        yield path.replace("a", "%61").replace("%", "%25")


HAND_WRITTEN: Final = tuple(dict.fromkeys(_by_hand()))
"""Each way by itself, for a few documents."""


def is_plain_http(target: str) -> bool:
    """Whether HAProxy's rules see it: others it refuses before it looks at any; a whole URI is no path."""
    return target.startswith("/") and all("!" <= one <= "~" and one != "#" for one in target)


def _escaped(letter: str, how: int) -> str:
    escape = f"%{ord(letter):02x}"
    return (letter, escape, escape.upper(), letter.upper(), f"%25{escape[1:]}")[how]


@st.composite
def _written(draw: st.DrawFn) -> str:
    """One path, its slashes, letters, version, beginning and end each perhaps written in another way."""
    names = draw(st.sampled_from(PATHS)).split("/")[1:]
    if names[-1:] != [""] and draw(st.integers(0, 3)) == 0:
        place = 1 if names[0] == "openstack" and len(names) > 1 else 0
        names[place] = draw(st.sampled_from(_VERSIONS))
    # Most of a path stays as it is: what is spelt oddly everywhere leads nowhere.
    how = st.sampled_from((0,) * 12 + (1, 2, 3, 4))
    if draw(st.booleans()):
        names = ["".join(_escaped(letter, draw(how)) for letter in name) for name in names]
    slash = st.one_of(*[st.just("/")] * 4, st.sampled_from(_SLASHES))
    path = "".join(f"{draw(slash)}{name}" for name in names)
    heads = draw(st.lists(st.sampled_from(_HEADS), max_size=2))
    tails = draw(st.lists(st.sampled_from(_TAILS), max_size=2))
    return "".join((*heads, path, *tails))


def spellings() -> st.SearchStrategy[str]:
    """Request targets: two in three of them lead to a document, or would if somebody undid what they hide."""
    odd = st.text(
        st.sampled_from("/.%2eEfF5cC;\\?+:@~-_0aexlst\x7f\xe4"), min_size=1, max_size=24
    ).map("/{}".format)
    return st.one_of(_written(), _written(), odd)
