"""Parser for ini files of OpenStack's services, as oslo.config parses them, with the line of each value.

Source: oslo.config 10, `iniparser.py` and `cfg.py` (`ConfigParser`, `Template`). Differences: an invalid file is
refused with all of its faults at once, and control characters are faults.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

DEFAULT_SECTION: Final = "DEFAULT"
_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_REFERENCE: Final = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<bare>[_a-z][._a-z0-9]*)|\{(?P<braced>[_a-z][._a-z0-9]*)\})",
    re.IGNORECASE | re.ASCII,
)
_LINE: Final = "the line"
"""Name of an unreadable line in messages, instead of its content, which can be a secret."""
_MAX_PROBLEMS: Final = 100
_MAX_DEPTH: Final = 10


@dataclass(frozen=True, slots=True)
class IniOption:
    """Option in a file.

    Attributes:
        section: `DEFAULT`, or another name in lower case: oslo.config ignores the case of other sections.
        value: Value without blanks and one pair of quotes around it; continuation lines are joined by newlines.
    """

    section: str
    name: str
    value: str
    file: str
    line: int


def decode_ini(data: bytes, file: str) -> str:
    """Decode a file. Raises `ConfigUnreadable`: the file is not UTF-8; the message has the line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigUnreadable(
            f"{file}:{line} is not UTF-8 text", hint="is it an ini file?"
        ) from error


def parse_ini(text: str, file: str) -> tuple[IniOption, ...]:
    """Return every option of the file in its order, including repeated options.

    Raises `ConfigInvalid`: a line is neither section, option, comment, nor the continuation of an option, or an option
    stands before the first section.
    """
    options: list[IniOption] = []
    problems: list[Problem] = []
    section: str | None = None
    goes_on = False
    for number, raw in enumerate(_LINE_END.split(text), 1):
        line = raw.rstrip()
        if goes_on and line and line[0] in " \t":
            value = f"{options[-1].value}\n{line.lstrip()}"
            options[-1] = replace(options[-1], value=value)
            continue
        goes_on = False
        name, value, fault = _read_line(line)
        if fault is not None:
            problems.append(Problem(_LINE, *fault, file=file, line=number))
        elif line[:1] == "[":
            section = name if name == DEFAULT_SECTION else name.lower()
        elif name:
            options.append(IniOption(section or "", name, value, file, number))
            goes_on = True
    for option in options:
        if not option.section:
            hint = "begin with [DEFAULT]"
            fault = "stands before the first section", hint
        elif any(ord(letter) < ord(" ") and letter not in "\n\t" for letter in option.value):
            fault = "has a control character", ""
        else:
            continue
        problems.append(Problem(option.name, *fault, file=file, line=option.line))
    if problems:
        count = len(problems)
        raise ConfigInvalid(
            f"{file} is not an ini file of OpenStack: {count} line{'s' if count > 1 else ''} cannot be read",
            problems=sorted(problems, key=lambda problem: problem.line or 0)[:_MAX_PROBLEMS],
        )
    return tuple(options)


def _read_line(line: str) -> tuple[str, str, tuple[str, str] | None]:
    """Parse a line: the name of a section, or name and value of an option, or the fault.

    A comment or blank line gives empty texts.
    """
    if not line or line[0] in "#;":
        return "", "", None
    if line[0] in " \t":
        return "", "", ("continues an option, but no option precedes it", "")
    if line[0] == "[":
        if line[-1] != "]":
            return "", "", ("has no ] at its end", "[SECTION]")
        return line[1:-1], "", None if line[1:-1] else ("has no name between [ and ]", "[SECTION]")
    sign = re.search("[=:]", line)
    if sign is None:
        return "", "", ("is not a section, option or comment", "NAME = VALUE")
    name, value = line[: sign.start()].strip(), line[sign.end() :].strip()
    if value and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return name, value, None if name else ("has no name before the sign", "NAME = VALUE")


def find_option(
    files: Sequence[Sequence[IniOption]], names: Iterable[tuple[str, str]]
) -> IniOption | None:
    """Return the option in force.

    That is the last value in the last file that has any of the names; if the file has several, the first name counts.

    Args:
        files: Results of `parse_ini`, in the order in which the service reads the files.
        names: `(section, name)`, the current name before the deprecated ones.
    """
    wanted = list(names)
    for options in reversed(files):
        for section, name in wanted:
            for option in reversed(options):
                if (option.section, option.name) == (section, name):
                    return option
    return None


def expand_value(value: str, look_up: Callable[[str], str | None], *, depth: int = 0) -> str:
    r"""Expand the references in a value: `$name`, `${name}`; `$$` and `\$` are a dollar.

    `look_up`: returns another option's value as written, or `None`. Raises `ValueError`: the value refers to an unknown
    option, or to itself.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("refers to itself")

    def put(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name = found["bare"] or found["braced"]
        other = look_up(name)
        if other is None:
            raise ValueError(f"refers to ${name}, which no file has")
        return expand_value(other, look_up, depth=depth + 1)

    return _REFERENCE.sub(put, value.replace("\\$", "$$"))
