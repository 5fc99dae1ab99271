"""Whatever a file or a socket holds, who reads it gives back a value or raises what it says, and nothing else."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imdsproxy.app.policy_store import read_overrides
from imdsproxy.config.load import load_settings
from imdsproxy.core.haproxy import maps, runtime
from imdsproxy.core.policy import OperatorOverride
from imdsproxy.core.tokens import TokenKeysUnreadable, parse_token_keys
from imdsproxy.errors import ConfigError, HostRefused

_FIXED: Final = settings(max_examples=300, derandomize=True, deadline=None, database=None)

_SCALARS: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from((2**63, 2**64, -1, 10**40, 1e400, -0.0, float("nan"))),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(("10.0.0.5", "fe80::1%eth0", "::", "10.0.0.0/33", "/x", "..", "\0", "\ud800")),
    st.dates(),
    st.binary(max_size=4),
)

_SECTIONS: Final = "paths host haproxy documents resolver sources nova unix_listener log admin metrics policy tokens"
_SETTINGS: Final = (
    "listen endpoint tokens instances host networks enabled url endpoints endpoint_sets secret_file hold_s cache_mb "
    "maxconn level format path mode user"
)


def _trees(keys: str) -> st.SearchStrategy[Any]:
    """Anything that YAML may hold, its keys often those that are looked for."""
    names = st.one_of(*[st.sampled_from(keys.split())] * 4, st.text(max_size=5))
    return st.recursive(
        _SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=5)
        ),
        max_leaves=16,
    )


def _broken(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """A text with a piece of another one in place of a piece of its own, or as it is."""
    odd = st.text(
        st.sampled_from("\t\n\0 :-?[]{}&*!|>'\"%@`#,0x~.<=\ufeff\x85\u2028\ud800a"), max_size=8
    )

    def cut(whole: str, at: int, length: int, more: str) -> str:
        at %= len(whole) + 1
        return whole[:at] + more + whole[at + length :]

    return st.one_of(
        text, st.builds(cut, text, st.integers(0, 4_000), st.integers(0, 40), odd), odd
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _in_file(content: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        path.write_bytes(content)
        read(path)


# Settings


def _load(text: str, environment: dict[str, str]) -> None:
    def read(path: Path) -> None:
        with contextlib.suppress(ConfigError):
            load_settings(path, environment)

    _in_file(_bytes(text), read)
    _in_file(_bytes(text)[::2], read)


_TREES_OF_SETTINGS: Final = st.dictionaries(
    st.sampled_from(_SECTIONS.split()), _trees(_SETTINGS), max_size=4
)


@_FIXED
@given(text=_broken(_TREES_OF_SETTINGS.map(yaml.safe_dump)))
@example(text="policy: {host: {tokens: !!python/object:os.system x}}")
@example(text="a: &a [*a]")
@example(text="policy: &a {host: *a}")
@example(text="[" * 5_000)
@example(text="haproxy: {maxconn: " + "9" * 5_000 + "}")
@example(text="log: {level: 2020-13-45}")
@example(text="? [a]\n: b")
@example(text="? {a: b}\n: c")
@example(text="\ud800: x")
@example(text="---\na: 1\n---\nb: 2\n")
@example(text="resolver: {hold_s: .nan}")
@example(text="resolver: {hold_s: .inf}")
@example(text="<<: [1, 2]\n")
@example(text="policy: {instances: {1: {}, true: {}, null: {}}}")
def test_settings_are_read_or_refused_as_settings_are(text: str) -> None:
    _load(text, {})


@pytest.mark.slow
@_FIXED
@given(
    name=st.one_of(
        st.sampled_from(("POLICY__HOST__TOKENS", "NOVA__ENDPOINT_SETS", "LOG__LEVEL", "__", "A__")),
        st.text(st.characters(codec="ascii", exclude_characters="\0="), max_size=20),
    ),
    value=_broken(_SCALARS.map(str)).map(lambda text: text.replace("\0", "")),
)
def test_the_environment_is_read_or_refused_as_settings_are(name: str, value: str) -> None:
    _load("", {f"IMDSPROXY_{name}": value})


# What HAProxy says

_SAID: Final = st.one_of(
    st.text(max_size=60),
    st.text(st.sampled_from("#,0123456789 \n\t-.=masterworkSucces\u0661\xb2\0"), max_size=120),
    st.lists(
        st.sampled_from(
            ("#<PID> <type> <reloads> <uptime> <version>", "# workers", "# old workers", "1 master 0 0d 3",
             "2 worker 1 0d 3", "\xb2 worker 1", "2 master x 0d", "\u0663 master \u0664 x", "Success=1", "--",
             "HAProxy version 3.0.11-1", "HAProxy version 3.", "# pxname,svname,status", "a,b", ",,,,")
        ),
        max_size=8,
    ).map("\n".join),
)  # fmt: skip


@_FIXED
@given(said=_SAID)
@example(said="\xb2 master 0 0d 3")
@example(said="1 master \xb2 0d 3")
@example(said="1 master x 0d 3")
@example(said="9" * 5_000 + " master 0 0d 3")
@example(said="HAProxy version " + "9" * 5_000 + ".1")
def test_whatever_haproxy_says_is_read_as_far_as_it_can_be(said: str) -> None:
    runtime.parse_processes(said)
    runtime.parse_reload(said)
    runtime.parse_version(said)
    runtime.parse_features(said)
    runtime.parse_stat(said)
    runtime.parse_stat(said, ("svname", "status"))
    maps.parse_map(said)


# Secrets and what operators did


@_FIXED
@given(
    text=_broken(
        st.lists(st.binary(min_size=30, max_size=34).map(lambda key: f"{key!r}")).map("\n".join)
    )
)
@example(text="A" * 43 + "=\n" + "A" * 43 + "=")
@example(text="\u0661" * 43 + "=")
@example(text="A" * 42 + "B=")
def test_token_keys_are_read_or_refused_without_a_word_of_them(text: str) -> None:
    said = ""
    try:
        assert parse_token_keys(text)
    except TokenKeysUnreadable as error:
        said = str(error)
    assert not any(line in said for line in text.split() if len(line) > 8)


_GUARDS: Final = st.one_of(
    _trees("format instances a").map(lambda tree: json.dumps(tree, default=str)),
    st.dictionaries(st.text(max_size=4), _trees("a")).map(
        lambda told: json.dumps({"format": 1, "instances": told}, default=str)
    ),
)


@_FIXED
@given(text=_broken(_GUARDS))
@example(text="[" * 100_000)
@example(text='{"format": 1, "instances": {"a": [' + "9" * 5_000 + ", 0]}}")
@example(text='{"format": 1, "instances": {"a": [1e999, 0]}}')
@example(text='{"format": 1, "instances": {"a": [NaN, 0]}}')
@example(text='{"format": 1, "instances": {"a": [true, 0]}}')
@example(text='{"format": 1, "instances": {"a": 1}}')
@example(text='{"format": 1, "instances": null}')
@example(text="null")
def test_guards_are_read_or_refused_as_damaged(text: str) -> None:
    def read(path: Path) -> None:
        with contextlib.suppress(HostRefused):
            for one in read_overrides(path).values():
                assert type(one) is OperatorOverride
                assert min(one.epoch, one.reopened_at) >= 0

    _in_file(_bytes(text), read)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\0" * 9, b"\xef\xbb\xbf{}"])
def test_guards_that_are_no_text_are_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "guards"
    path.write_bytes(content)
    with pytest.raises(HostRefused):
        read_overrides(path)
