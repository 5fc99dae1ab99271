from pathlib import Path

import pytest

from support.document_blocks import Block, blocks_of, missing_lines, section

_TEXT = """\
# Page

## One

Do this:

    cat >file <<'END'
    a:

      b
    END

```text
first …
last   line
```

And this:

    second

```yaml
    no: command
```

### Below it

    third

## Two

    other
"""


def test_the_blocks_of_a_heading_are_found_with_what_they_print(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(_TEXT)
    assert blocks_of(page, "## One") == [
        Block(7, "cat >file <<'END'\na:\n\n  b\nEND", ("first …", "last   line")),
        Block(20, "second"),
        Block(28, "third"),
    ]
    assert [one.script for one in blocks_of(page, "### Below it")] == ["third"]
    with pytest.raises(KeyError):
        section(page, "## Three")


@pytest.mark.parametrize(
    ("output", "missing"),
    [
        ("first thing\nand the last line\n", []),
        ("first thing\nlast  line", []),
        ("last line\nfirst thing", ["last   line"]),
        ("last line", ["first …"]),
        ("first lastline", ["last   line"]),
    ],
)
def test_what_is_not_printed_in_this_order_is_told(output: str, missing: list[str]) -> None:
    assert missing_lines(Block(1, "", ("first …", "last   line")), output) == missing
