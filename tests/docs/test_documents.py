"""What the documents say is there: links, paths, commands, settings, metrics, codes."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from imdsproxy.config.describe import find_setting
from imdsproxy.config.schema import Settings
from imdsproxy.haproxy.layout import Layout
from imdsproxy.network.planned import NotServedCode
from support.demonstration import REPOSITORY
from support.pages import each_page, each_page_of_now, prose

_ADR: Final = REPOSITORY / "docs/adr"
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE: Final = re.compile(r"`([^`\n]+)`")
_PLACES: Final = ("src/", "tests/", "docs/", "packaging/", "script/", "demo/", "bench/")
_ARCHITECTURE_WORDS: Final = 4_000
_EXPOSURE: Final = re.compile(r"^\| `(\S+\.service)` \| ([0-9.]+) \|", re.MULTILINE)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found}


def words_in_code(page: Path) -> Iterator[str]:
    """Every piece of inline code."""
    yield from _CODE.findall(page.read_text())


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


@each_page
def test_no_page_has_a_word_that_is_not_used_here(page: Path) -> None:
    contributing = REPOSITORY / "CONTRIBUTING.md"
    table = contributing.read_text().partition("| not used | instead |")[2].partition("\n\n")[0]
    words = ", ".join(re.findall(r"^\| ([a-z ,]+) \|", table, re.MULTILINE)).split(", ")
    assert len(words) > 10
    if page != contributing:
        used = rf"\b(?:{'|'.join(words)})s?\b.{{0,30}}"
        assert re.findall(used, prose(page), re.IGNORECASE) == []


@each_page
def test_every_path_of_the_repository_that_is_named_exists(page: Path) -> None:
    named = [
        code.split()[0].rstrip("/") for code in words_in_code(page) if code.startswith(_PLACES)
    ]
    lines = page.read_text().splitlines()
    named += [line.split()[0] for line in lines if line.startswith("    script/")]
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@each_page_of_now
def test_every_setting_that_is_named_exists(page: Path) -> None:
    sections = tuple(f"{name}." for name in Settings.model_fields)
    named = [code for code in words_in_code(page) if code.startswith(sections)]
    named = [name for name in named if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name)]
    # `haproxy.cfg` is a file, `haproxy.service` a unit, and look the same.
    others = {*files_of_the_daemon(), Settings().admin_socket.name, "haproxy.service"}
    assert [one for one in named if one not in others and not has_setting(one)] == []


def has_setting(name: str) -> bool:
    return find_setting(name.split(".")) is not None


@each_page_of_now
def test_every_metric_that_is_named_exists(page: Path) -> None:
    # The names and variables of the Ansible roles look like metrics.
    roles = (REPOSITORY / "packaging/ansible/roles").glob("*/meta/*.yml")
    sources = (REPOSITORY / "docs/reference/metrics.md", *roles)
    text = "".join(one.read_text() for one in sources)
    known = set(re.findall(r"imdsproxy_[a-z]\w+", text))
    assert set(re.findall(r"\bimdsproxy_[a-z]\w+", page.read_text())) - known == set()


def test_every_decision_is_in_the_index_with_its_title_and_says_what_was_decided_and_why() -> None:
    index = (_ADR / "README.md").read_text()
    present = sorted(_ADR.glob("[0-9]*.md"))
    assert _LINK.findall(index) == [page.name for page in present]
    for page in present:
        text = page.read_text()
        title = text.splitlines()[0]
        assert title.startswith(f"# {page.name[:4]}: ")
        assert f"| {title.partition(': ')[2]} |" in index
        assert re.match(r"Status: (Accepted[.;]|Superseded by )", text.splitlines()[2]), page.name
        if "left-out" not in page.name:
            parts = ["The case", "The decision", "What follows"]
            assert re.findall(r"^## (.+)$", text, re.MULTILINE) == parts, page.name


def test_the_runbook_knows_every_reason_for_which_a_network_is_not_served() -> None:
    table = (REPOSITORY / "docs/how-to/troubleshoot.md").read_text()
    section = table.partition("### A network is not served")[2].partition("\n### ")[0]
    told = {
        code
        for line in section.splitlines()
        if line.startswith("| `")
        for code in _CODE.findall(line.split("|")[1])
    }
    assert told == {code.value for code in NotServedCode}


def test_the_architecture_names_every_file_and_socket_and_stays_short() -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    # What belongs to one file stands in its row without the file's name before it.
    named = [name.removeprefix("haproxy.cfg") or name for name in files_of_the_daemon()]
    assert [name for name in named if name not in text] == []
    assert len(text.split()) <= _ARCHITECTURE_WORDS


def files_of_the_daemon() -> Iterator[str]:
    """The name of every file, socket and directory that has its place in the layout."""
    layout = Layout(Path("/run/imdsproxy"), Path("/var/lib/imdsproxy"))
    for attribute in dir(Layout):
        value = None if attribute.startswith("_") else getattr(layout, attribute)
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                yield path.name


def test_the_units_name_the_places_that_the_daemon_uses() -> None:
    unit = (REPOSITORY / "packaging/systemd/imdsproxy-haproxy.service").read_text()
    defaults = Settings()
    layout = Layout(defaults.paths.runtime_dir, defaults.paths.state_dir)
    start = re.search(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert start is not None
    words = start[1].split()
    master = ["-S", f"{layout.master_socket},mode,600"]
    assert words[1:] == ["-Ws", *master, "-n", "$MAXCONN", "-f", str(layout.config)]
    assert f"EnvironmentFile=-{layout.environment}" in unit
    assert f"ConditionPathExists={layout.config}" in unit
    names = {defaults.haproxy.unit, defaults.documents.unit, "imdsproxy.service"}
    names |= {defaults.identity.unit, defaults.identity.signer_unit}
    names |= {"imdsproxy-hub.service", "imdsproxy-hub-signer.service"}
    assert {path.name for path in (REPOSITORY / "packaging/systemd").iterdir()} == names


def test_no_unit_is_more_open_than_it_is_said_to_be() -> None:
    units = sorted((REPOSITORY / "packaging/systemd").glob("*.service"))
    said = dict(_EXPOSURE.findall((REPOSITORY / "SECURITY.md").read_text()))
    assert set(said) == {unit.name for unit in units}
    command = (
        "/usr/bin/systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        *map(str, units),
    )
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    found = dict(re.findall(r"exposure level for (\S+): ([0-9.]+)", ran.stdout))
    assert found.keys() == said.keys()
    assert {name for name, figure in found.items() if float(figure) > float(said[name])} == set()
