"""Every block of code in the documents is well-formed in its language."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import yaml
from markdown_it import MarkdownIt

from support.pages import each_page

_YAML: Final = re.compile(r"(#.*\n|-? *[\w.-]+:(\s|$))")
_TEXT: Final = frozenset({"text", "ini", "diff"})


def blocks(page: Path) -> Iterator[tuple[int, str, str]]:
    """The line, the language and the text of each block. One without a language is YAML, XML or for a shell."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            yield token.map[0] + 1 if token.map else 0, token.info.split(" ")[0], token.content
        elif token.type == "code_block":
            yield token.map[0] + 1 if token.map else 0, guess(token.content), token.content


def guess(text: str) -> str:
    first = next(line for line in text.splitlines() if not line.startswith("#"))
    if first.startswith("<"):
        return "xml"
    return "yaml" if _YAML.match(first) else "sh"


def fault(language: str, text: str) -> str:
    """What is wrong with it, or nothing."""
    try:
        match language:
            case "yaml":
                list(yaml.safe_load_all(text))
            case "json":
                json.loads(text)
            case "xml":
                ET.fromstring(f"<page>{text}</page>")  # noqa: S314 - our own page
            case "sh" | "bash":
                command = ["bash", "-n"]
                done = subprocess.run(
                    command, input=text, capture_output=True, text=True, check=False
                )
                return done.stderr
            case _ if language in _TEXT:
                pass
            case _:
                return f"unknown language {language!r}"
    except (ValueError, yaml.YAMLError, ET.ParseError) as error:
        return str(error)
    return ""


@each_page
def test_every_block_is_well_formed_in_its_language(page: Path) -> None:
    faults = [(line, fault(language, text)) for line, language, text in blocks(page)]
    assert [one for one in faults if one[1]] == []
