"""The ini files of OpenStack's services, read as oslo.config reads them, with the line of each value.

Source: oslo.config 10, `iniparser.py` and `cfg.py` (`ConfigParser`, `Template`). What differs: a file is refused with
all its faults at once, and control characters in it are faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from imdsproxy.errors import ConfigInvalid, ConfigUnreadable, Problem

DEFAULT_SECTION: Final = "DEFAULT"
_LINE_END: Final = re.compile(r"\r\n|\r|\n")
_REFERENCE: Final = re.compile(
    r"\$(?:(?P<dollar>\$)|(?P<bare>[_a-z][._a-z0-9]*)|\{(?P<braced>[_a-z][._a-z0-9]*)\})",
    re.IGNORECASE | re.ASCII,
)
_LINE: Final = "the line"
"""How a line is called that cannot be read: what it says can be a secret."""
_MAX_PROBLEMS: Final = 100
_MAX_DEPTH: Final = 10


@dataclass(frozen=True, slots=True)
class IniOption:
    """One value as it is written.

    Attributes:
        section: `DEFAULT`, or another name in lower case: oslo.config tells no cases apart there.
        name: As it is written.
        value: Without the blanks and one pair of quotes around it; lines that go on are joined by newlines.
        line: 1-based line of the name.
    """

    section: str
    name: str
    value: str
    file: str
    line: int


def decode_ini(data: bytes, file: str) -> str:
    """The text of a file.

    Raises:
        ConfigUnreadable: It is not UTF-8; the message has the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigUnreadable(
            f"{file}:{line} is not UTF-8 text", hint="is it an ini file?"
        ) from error


def parse_ini(text: str, file: str) -> tuple[IniOption, ...]:
    """Every option of the file, in its order, also those that stand more than once.

    Args:
        text: The file's text.
        file: Its name, for messages about it.

    Raises:
        ConfigInvalid: A line is neither section, option, comment, nor goes on with an option before it, or an option
            stands before the first section.
    """
    reader = _Reader(file)
    for number, line in enumerate(_LINE_END.split(text), 1):
        reader.read(number, line.rstrip())
    reader.finish()
    if reader.problems:
        count = len(reader.problems)
        raise ConfigInvalid(
            f"{file} is no ini file of OpenStack: {count} line{'s' if count > 1 else ''} cannot be read",
            problems=reader.problems[:_MAX_PROBLEMS],
        )
    return tuple(reader.options)


def find_option(
    files: Sequence[Sequence[IniOption]], names: Iterable[tuple[str, str]]
) -> IniOption | None:
    """The option that is in force: of the last file that has one, its first name there, its last value.

    Args:
        files: What `parse_ini` gave, in the order in which the service was given the files.
        names: `(section, name)`, today's name before the deprecated ones.
    """
    wanted = list(names)
    for options in reversed(files):
        for section, name in wanted:
            for option in reversed(options):
                if (option.section, option.name) == (section, name):
                    return option
    return None


def expand_value(value: str, look_up: Callable[[str], str | None], *, depth: int = 0) -> str:
    r"""The value with what it refers to in its place: `$name`, `${name}`; `$$` and `\$` are a dollar.

    Args:
        value: As it is written.
        look_up: The value, as it is written, of another option, or `None`.
        depth: How many references led here.

    Raises:
        ValueError: It refers to an option that is not there, or to itself.
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


class _Reader:
    """One pass over the lines; an option is complete when something else than its next line comes."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.options: list[IniOption] = []
        self.problems: list[Problem] = []
        self._section: str | None = None
        self._open: tuple[str, int, list[str]] | None = None

    def read(self, number: int, line: str) -> None:
        if not line:
            self.finish()
        elif line[0] in " \t":
            self._go_on(number, line.lstrip())
        else:
            self.finish()
            self._begin(number, line)

    def finish(self) -> None:
        if self._open is None:
            return
        name, number, lines = self._open
        self._open = None
        value = "\n".join(lines)
        if self._section is None:
            self._refuse(number, name, "stands before the first section", "begin with [DEFAULT]")
        elif any(ord(letter) < ord(" ") and letter not in "\n\t" for letter in value):
            self._refuse(number, name, "has a control character")
        else:
            self.options.append(IniOption(self._section, name, value, self.file, number))

    def _go_on(self, number: int, line: str) -> None:
        if self._open is None:
            self._refuse(number, _LINE, "goes on with an option, and none is before it")
        else:
            self._open[2].append(line)

    def _begin(self, number: int, line: str) -> None:
        if line[0] in "#;":
            return
        if line[0] == "[":
            self._begin_section(number, line)
            return
        at = min((at for at in (line.find("="), line.find(":")) if at >= 0), default=-1)
        name, value = line[:at].strip(), line[at + 1 :].strip()
        if at < 0:
            self._refuse(number, _LINE, "is no section, option or comment", "NAME = VALUE")
        elif not name:
            self._refuse(number, _LINE, "has no name before the sign", "NAME = VALUE")
        else:
            self._open = name, number, [_unquoted(value)]

    def _begin_section(self, number: int, line: str) -> None:
        if line[-1] != "]":
            self._refuse(number, _LINE, "has no ] at its end", "[SECTION]")
        elif len(line) == len("[]"):
            self._refuse(number, _LINE, "has no name between [ and ]", "[SECTION]")
        else:
            name = line[1:-1]
            self._section = name if name == DEFAULT_SECTION else name.lower()

    def _refuse(self, number: int, what: str, reason: str, hint: str = "") -> None:
        self.problems.append(Problem(what, reason, hint, self.file, number))


def _unquoted(value: str) -> str:
    if value and value[0] == value[-1] and value[0] in "\"'":
        return value[1:-1]
    return value
