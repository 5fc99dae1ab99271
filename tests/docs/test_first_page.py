"""What the first page says of imdsproxy and of others can be checked."""

import re
from typing import Final

from support.demonstration import REPOSITORY
from support.document_blocks import section

_PAGE: Final = REPOSITORY / "README.md"
_PROOFS: Final = REPOSITORY / "docs/explanation/alternatives.md"
_LINK: Final = re.compile(r"^\| \[([^\]]+)\]\(docs/explanation/alternatives\.md#[\w-]+\) \|")


def test_each_line_of_the_comparison_leads_to_a_test_of_ours_and_to_a_page_of_theirs() -> None:
    text = "\n".join(section(_PAGE, "## Beside the alternatives")[1])
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 10
    cells = {line.count(" | ") for line in lines}
    assert cells == {6}, "a cell for each alternative"
    for line in lines:
        found = _LINK.match(line)
        assert found, line
        name = re.sub(r" \(.*", "", found[1])
        proof = "\n".join(section(_PROOFS, f"## {name[0].upper()}{name[1:]}")[1])
        assert re.search(r"`test_\w+\.py::test_\w+`", proof), name
        assert "](https://" in proof, name
