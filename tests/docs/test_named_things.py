"""Nothing in the documents speaks of a thing that is not there: commands, flags, settings, codes, files, units, rows.

Links, paths of the repository and metrics are in test_documents.py.
"""

import fnmatch
import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from bench.__main__ import parse_options
from imdsproxy.api.app import admin_app
from imdsproxy.cli.main import build_program, iterate_commands, main
from imdsproxy.config.schema import Settings
from imdsproxy.config.strict_yaml import parse_yaml
from imdsproxy.errors import KINDS
from imdsproxy.hub.api.app import operators_app
from imdsproxy.model.records import parse_records
from imdsproxy.network.planned import NotServedCode
from imdsproxy.tools.namespace_proxy import run_parser
from support.demonstration import REPOSITORY
from support.pages import PAGES, code_blocks, each_page, each_page_of_now, inline_code

_CALL: Final = re.compile(
    r"(?:^|[;|&(]\s*|\b(?:until|while|if|exec \S+) )imdsproxy ((?:-c \S+ )?[a-z-][^|;>)&\n]*)"
)
_WORD: Final = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)+")
_FLAG: Final = re.compile(r"--[a-z][a-z0-9-]*")
_FILE: Final = re.compile(r"/(?:run|var/lib|var/log|etc)/imdsproxy/([\w.-]*\w)")
_UNIT: Final = re.compile(r"\bimdsproxy[\w-]*\.service\b")
_ROUTE: Final = re.compile(r"(?<!:8200)/v1(?:/[\w-]+|/\{\w+\})+")
"""Route of ours; OpenBao's are behind its port."""
_INSTALLED: Final = re.compile(
    r"/usr/(?:lib|share)/(?:[\w.-]+/)*(?:_?imdsproxy|neutron-ns)[\w./*-]*[\w*]"
)
_BY_THE_PACKAGER: Final = frozenset({"/usr/share/doc/imdsproxy"})
_SHIPPED: Final = ("src", "packaging", "script", "bench", "demo", "requirements")

_FOREIGN_FLAGS: Final = frozenset(
    {
        "--authentication-config",
        "--bump-revision",
        "--etag-compare",
        "--fork-strategy",
        "--group",
        "--listen-client-http-urls",
        "--quota-backend-bytes",
        "--no-binary",
    }
    | {"--nodaemonize", "--nodebug", "--nouse-syslog"}
)
"""Flags of other programs that documents name by themselves, and those of Neutron's that are taken in that spelling."""

_FOREIGN_WORDS: Final = frozenset(
    {"bind-interfaces", "config-2", "listen-address", "no-mac-spoofing", "set-fc-mark"}
)
"""Words of other programs that look like codes of ours."""

_EXAMPLES: Final = frozenset(
    {
        *("nova.secret", "nova.secret.next", "store.copy", "bundle.tar.gz"),
        *("zone-re", "zone-red", "imds-hops", "net-blue", "new-host", "vm-1"),
    }
)
"""Names that an operator has chosen, or the daemon makes of a setting."""


def calls(page: Path) -> Iterator[str]:
    """Every call of imdsproxy, wherever it stands in a command line, without redirections and what comes after it."""
    for block in code_blocks(page):
        if block.language in ("sh", "bash"):
            for line in block.text.replace("\\\n", " ").splitlines():
                yield from _CALL.findall(line.partition(" #")[0])
    for code in inline_code(page):
        yield from _CALL.findall(code.partition("…")[0])


@each_page
def test_every_command_is_one_that_the_program_takes_with_these_flags(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {}
    for call in calls(page):
        status = main([*shlex.split(call), "--help"])
        printed = capsys.readouterr()
        if status != 0 or not printed.out:
            refused[call] = printed.err
    assert refused == {}


@cache
def flags() -> frozenset[str]:
    """Of all commands, of the proxy for one network, and of the scripts."""
    found = {"--help"}
    for _, command in iterate_commands(build_program(), "imdsproxy"):
        for parameter in command.params:
            found |= {*parameter.opts, *parameter.secondary_opts}
    for action in run_parser("proxy")._actions:
        found |= {*action.option_strings}
    for script in (REPOSITORY / "script").iterdir():
        found |= {*_FLAG.findall(script.read_text())} if script.is_file() else set()
    return frozenset(found | {*_FLAG.findall((REPOSITORY / "bench/__main__.py").read_text())})


@each_page
def test_every_flag_that_is_named_by_itself_is_one_of_ours_or_known_as_anothers(page: Path) -> None:
    named = {
        one for code in inline_code(page) if code.startswith("--") for one in _FLAG.findall(code)
    }
    assert named - flags() - _FOREIGN_FLAGS == set()


@each_page
def test_every_block_of_settings_or_records_is_taken(page: Path) -> None:
    for block in code_blocks(page):
        if block.language != "yaml":
            continue
        document: Any = parse_yaml(block.text, str(page)).value
        if isinstance(document, list):  # A playbook, which tests/e2e/test_ansible_role.py runs.
            continue
        if {*document} <= {*Settings.model_fields}:
            Settings.model_validate(document)
        elif {*document} <= {"networks", "instances"}:
            assert parse_records(document).problems == ()


@cache
def shipped() -> str:
    """What is shipped, and the scripts: all of it."""
    paths = (path for folder in _SHIPPED for path in (REPOSITORY / folder).rglob("*"))
    return "\n".join(path.read_text() for path in paths if path.is_file() and path.suffix != ".pyc")


@cache
def codes() -> frozenset[str]:
    """Every code, and every word with hyphens in what is shipped: findings, units, commands, rows."""
    computed = {*(kind.code for kind in KINDS), *(code.value for code in NotServedCode)}
    return frozenset(computed | {*_WORD.findall(shipped())})


@each_page_of_now
def test_every_code_is_one_that_the_program_has(page: Path) -> None:
    named = {code for code in inline_code(page) if _WORD.fullmatch(code)}
    assert named - codes() - _FOREIGN_WORDS - _EXAMPLES == set()


@cache
def file_names() -> frozenset[str]:
    """Every word that can be a file's name in what is shipped."""
    return frozenset(re.findall(r"[\w.-]*\w", shipped()))


@each_page
def test_every_file_of_the_daemon_is_one_that_it_has(page: Path) -> None:
    assert {*_FILE.findall(page.read_text())} - file_names() - _EXAMPLES == set()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Every path that a package brings, directories too."""
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([str(REPOSITORY / "packaging/install"), str(root)], check=True, timeout=60)
    return frozenset(f"/{path.relative_to(root)}" for path in root.rglob("*"))


@each_page
def test_every_installed_path_is_one_that_a_package_brings(
    page: Path, installed: frozenset[str]
) -> None:
    named = {*_INSTALLED.findall(page.read_text())} - _BY_THE_PACKAGER
    assert [one for one in named if not fnmatch.filter(installed, one)] == []


def test_all_that_is_installed_without_a_package_is_removed_as_the_page_says(
    installed: frozenset[str],
) -> None:
    page = REPOSITORY / "docs/how-to/install.md"
    lines = page.read_text().partition("\nWithout the package:\n")[2].splitlines()
    removed = [word for line in lines if line.startswith("    rm ") for word in line.split()[1:]]
    patterns = [part for word in removed for part in (word, f"{word}/*")]
    left = [
        one
        for one in installed
        if "imdsproxy" in one and not any(fnmatch.fnmatch(one, part) for part in patterns)
    ]
    assert (removed != [], left) == (True, [])


@each_page
def test_every_unit_is_one_that_is_packaged(page: Path) -> None:
    packaged = {path.name for path in (REPOSITORY / "packaging/systemd").iterdir()}
    named = {*_UNIT.findall(page.read_text())}
    assert named - packaged == set()


@cache
def routes() -> frozenset[str]:
    """Each route of the admin API, with `X` for what is in braces."""
    paths = (*admin_app(None).openapi()["paths"], *operators_app(None).openapi()["paths"])
    return frozenset(re.sub(r"\{\w+\}", "X", path) for path in paths)


@each_page_of_now
def test_every_route_of_an_api_is_there(page: Path) -> None:
    named = {re.sub(r"\{\w+\}|[A-Z]{2,}", "X", path) for path in _ROUTE.findall(page.read_text())}
    assert named - routes() == set()


def test_every_row_of_measurements_that_a_command_names_can_be_measured() -> None:
    texts = "\n".join(block.text for page in PAGES for block in code_blocks(page))
    calls_of_bench = re.findall(r"^script/bench\b([^#\n]*)", texts, re.MULTILINE)
    assert len(calls_of_bench) > 3
    for words in calls_of_bench:
        parse_options([word for word in words.split() if word not in ("--peer", "DIR")])
