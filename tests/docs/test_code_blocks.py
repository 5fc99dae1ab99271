"""Every block of code in the documents is well-formed in its language."""

import json
import subprocess
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import yaml

from support.pages import code_blocks, each_page

_TEXT: Final = frozenset({"text", "ini", "diff"})


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
    faults = [(one.line, fault(one.language, one.text)) for one in code_blocks(page)]
    assert [one for one in faults if one[1]] == []
