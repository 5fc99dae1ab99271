from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imdsproxy.core.neutron_ini import IniOption, decode_ini, expand_value, find_option, parse_ini
from imdsproxy.errors import ConfigInvalid, ConfigUnreadable

_TEXT = """\
# a comment
; another
[DEFAULT]
plain = value
  and more
# ends it
colon : a = b
equal=a : b
quoted = "  kept  "
single = 'a'
half = "a
empty =
plain = last

[Agent]
key = 1 # no comment
[ s ]
key = 2
"""


def _values(text: str) -> list[tuple[str, str, str, int]]:
    return [(one.section, one.name, one.value, one.line) for one in parse_ini(text, "f")]


def test_a_file_is_read_as_its_service_reads_it() -> None:
    assert _values(_TEXT) == [
        ("DEFAULT", "plain", "value\nand more", 4),
        ("DEFAULT", "colon", "a = b", 7),
        ("DEFAULT", "equal", "a : b", 8),
        ("DEFAULT", "quoted", "  kept  ", 9),
        ("DEFAULT", "single", "a", 10),
        ("DEFAULT", "half", '"a', 11),
        ("DEFAULT", "empty", "", 12),
        ("DEFAULT", "plain", "last", 13),
        ("agent", "key", "1 # no comment", 16),
        (" s ", "key", "2", 18),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_as_on_any_system(end: str) -> None:
    assert _values(f"[a]{end}b = 1{end}{end}c = 2{end}") == [("a", "b", "1", 2), ("a", "c", "2", 4)]


def test_every_line_that_cannot_be_read_is_told_without_what_it_says() -> None:
    text = "before = 1\n[]\n[open\n  stray\n[x]\nsecret word\n= secret\n: secret\nok = \x00secret\n"
    with pytest.raises(ConfigInvalid) as caught:
        parse_ini(f"{text}\n  an empty line ends a value", "/etc/x.ini")
    named = {1: "before", 9: "ok"}
    lines = (1, 2, 3, 4, 6, 7, 8, 9, 11)
    assert [(one.file, one.line, one.field) for one in caught.value.problems] == [
        ("/etc/x.ini", line, named.get(line, "the line")) for line in lines
    ]
    assert "secret" not in str(caught.value)
    assert "stray" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused_with_their_line() -> None:
    with pytest.raises(ConfigUnreadable, match=r"x\.ini:3 is not UTF-8"):
        decode_ini(b"[a]\nb = 1\nc = \xff\n", "x.ini")


def _option(name: str, value: str, section: str = "DEFAULT") -> IniOption:
    return IniOption(section, name, value, "f", 1)


def test_a_later_file_wins_then_the_newer_name_then_the_later_line() -> None:
    first = (_option("new", "1"), _option("new", "2"), _option("old", "3"))
    second = (_option("old", "4"), _option("old", "5"), _option("other", "6"))
    names = [("DEFAULT", "new"), ("DEFAULT", "old")]

    assert find_option([second, first], names) == _option("new", "2")
    assert find_option([first, second], names) == _option("old", "5")
    assert find_option([first, second], [("agent", "new")]) is None


@pytest.mark.parametrize(
    ("value", "expanded"),
    [
        ("$state_path/x", "/var/x"),
        ("${state_path}x", "/varx"),
        ("${nested}", "/var/y"),
        ("$agent.host!", "h!"),
        ("5$$", "5$"),
        (r"\$state_path", "$state_path"),
        ("$ 5 $", "$ 5 $"),
        ("100%s", "100%s"),
        ("${state-path}", "${state-path}"),
    ],
)
def test_a_value_may_refer_to_others(value: str, expanded: str) -> None:
    others = {"state_path": "/var", "nested": "$state_path/y", "agent.host": "h"}

    assert expand_value(value, others.get) == expanded


@pytest.mark.parametrize(
    ("value", "why"), [("$none", "no file has"), ("$loop", "refers to itself")]
)
def test_a_value_that_leads_nowhere_is_refused(value: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        expand_value(value, {"loop": "x${loop}"}.get)


_NAME = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_.-]{0,12}", fullmatch=True)
_LINE = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=20)


@given(st.lists(st.tuples(_NAME, _NAME, st.lists(_LINE, min_size=1, max_size=3)), max_size=8))
def test_values_survive(rows: list[tuple[str, str, list[str]]]) -> None:
    text, wanted = "", []
    for section, name, (first, *others) in rows:
        rest = [one or "-" for one in others]  # an empty line would end the value
        text += f"[{section}]\n{name} = '{first}'\n" + "".join(f"  {one}\n" for one in rest)
        folded = section if section == "DEFAULT" else section.lower()
        wanted.append((folded, name, "\n".join([first, *rest])))

    assert [(one.section, one.name, one.value) for one in parse_ini(text, "f")] == wanted


@given(
    st.text()
    | st.text(st.sampled_from("[]=:#; \t\n\r\x0b\x85\u2028'\"ab"), max_size=60)
    | st.binary().map(lambda data: data.decode("latin-1"))
)
def test_any_text_is_read_or_refused_with_lines(text: str) -> None:
    try:
        options = parse_ini(text, "f")
    except ConfigInvalid as error:
        assert all(one.line for one in error.problems)  # noqa: PT017 - either way is right
        return
    assert all(one.name and one.section for one in options)


@given(st.text(st.sampled_from("$\\{}ab._ "), max_size=30))
def test_any_value_is_expanded_or_refused_in_words(value: str) -> None:
    others = {"a": "$b", "b": "x", "ab": "$ab"}
    try:
        expand_value(value, others.get)
    except ValueError as error:
        assert "refers to" in str(error)  # noqa: PT017 - either way is right
