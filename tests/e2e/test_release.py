"""A release: equal bytes wherever and whenever it is built, signed, described, made of its own sources."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.demonstration import REPOSITORY
from support.document_blocks import blocks_of, find_fault, script_of
from support.lab import run
from support.patience import patience
from support.pinned_venv import pinned_venv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_VERSION: Final = "1.0.0"
"""The one that docs/how-to/release.md releases."""
_COMMITTER: Final = {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "user.name",
    "GIT_CONFIG_VALUE_0": "Tests",
    "GIT_CONFIG_KEY_1": "user.email",
    "GIT_CONFIG_VALUE_1": "tests@example.invalid",
}
_BUILD_S: Final = 200
_INSTALL: Final = REPOSITORY / "docs/how-to/install.md"


@pytest.fixture(scope="module")
def tools() -> Path:
    """The programs of requirements/release.txt."""
    return pinned_venv("release") / "bin"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for all that tests make here, the home of a releaser with a key."""
    directory = tmp_path_factory.mktemp("release")
    (directory / ".ssh").mkdir(mode=0o700)
    key = directory / ".ssh/imdsproxy-release"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    """A work tree of these sources before the release of `_VERSION`."""
    target = place / "tree"
    words = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    for name in filter(None, run("git", "-C", str(REPOSITORY), *words).split("\0")):
        source, copy = REPOSITORY / name, target / name
        if source.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy, follow_symlinks=False)
    changelog = target / "CHANGELOG.md"
    before, _, after = changelog.read_text().partition("\n## ")
    released = after.replace("(unreleased)", "(2025-12-31)", 1)
    changelog.write_text(f"{before}\n## {_VERSION} (unreleased)\n\n- New.\n\n## {released}")
    git(target, "init", "--quiet")
    git(target, "add", "--all")
    git(target, "commit", "--quiet", "--message", "Sources")
    return target


@pytest.fixture(scope="module")
def released(place: Path, tree: Path, tools: Path) -> Path:
    """What is published: made by the commands of docs/how-to/release.md, which also build it again and compare."""
    page = REPOSITORY / "docs/how-to/release.md"
    blocks = blocks_of(page, "# Release")
    program = f'"{sys.executable}" script/release.py --tools "{tools}"'
    # Without a virtual environment for each of the two trees; and the second is built elsewhere in time too.
    script = f"""
script/release() {{
    case $PWD in
        {tree}) {program} "$@" ;;
        *) (umask 077; TZ=Asia/Tokyo LC_ALL=C PYTHONPATH=/nonexistent exec faketime "+400 days" {program} "$@") ;;
    esac
}}
set -eu
{script_of(blocks)}
"""
    status, printed = run_script(script, cwd=tree, home=place)
    assert find_fault(blocks, status, printed) == ""
    return tree / "dist" / _VERSION


def git(tree: Path, *words: str) -> str:
    return run(*("git", "-C", str(tree)), *words, environment=_COMMITTER)


def run_script(script: str, *, cwd: Path, home: Path) -> tuple[int, str]:
    done = subprocess.run(
        ("/bin/bash", "-c", script),
        cwd=cwd,
        env={**os.environ, **_COMMITTER, "HOME": str(home), "TMPDIR": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_BUILD_S * patience(),
        check=False,
    )
    return done.returncode, done.stdout


def test_a_release_built_twice_in_other_places_at_other_times_is_equal_bytes_and_complete(
    place: Path, released: Path
) -> None:
    # The page compares all checksums.
    sums = (released / "SHA256SUMS").read_text()
    names = sorted(line.split()[1] for line in sums.splitlines())
    assert names == [
        f"imdsproxy-{_VERSION}-1.src.rpm",
        f"imdsproxy-{_VERSION}-py3-none-any.whl",
        f"imdsproxy-{_VERSION}.cdx.json",
        f"imdsproxy-{_VERSION}.changes.md",
        f"imdsproxy-{_VERSION}.tar.gz",
        f"imdsproxy_{_VERSION}_all.deb",
    ]
    present = {one.name for one in released.iterdir()}
    assert present == {*names, "SHA256SUMS", "SHA256SUMS.sig"}
    again = place / "SHA256SUMS"
    again.write_text(sums)
    key = str(place / ".ssh/imdsproxy-release")
    run("ssh-keygen", "-q", "-Y", "sign", "-n", "imdsproxy-release", "-f", key, str(again))
    signature = (released / "SHA256SUMS.sig").read_bytes()
    assert again.with_suffix(".sig").read_bytes() == signature


def test_who_downloads_a_release_verifies_it_as_the_page_says(place: Path, released: Path) -> None:
    download = place / "download"
    shutil.copytree(released, download)
    kind, key, *_ = (place / ".ssh/imdsproxy-release.pub").read_text().split()
    (download / "allowed_signers").write_text(f"releases {kind} {key}\n")
    blocks = blocks_of(_INSTALL, "## Verifying what you have downloaded")

    script = f"set -eu\n{script_of(blocks)}"

    def verified() -> str:
        return find_fault(blocks, *run_script(script, cwd=download, home=place))

    assert verified() == ""
    with (download / f"imdsproxy_{_VERSION}_all.deb").open("ab") as package:
        package.write(b"x")
    assert "FAILED" in verified()
    with (download / "SHA256SUMS").open("a") as sums:
        sums.write("\n")
    assert "Could not verify signature" in verified() or "incorrect signature" in verified()


def test_the_source_archive_is_the_commit_and_gives_the_same_wheel(
    place: Path, tree: Path, released: Path
) -> None:
    archive = released / f"imdsproxy-{_VERSION}.tar.gz"
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    committed = set(git(tree, "ls-files", "-z").split("\0")) - {""}
    # Those are of no use there, and of another licence.
    not_in_it = (".ci/", "tests/support/axe/")
    wanted = {name for name in committed if not name.startswith(not_in_it)}
    assert names - {"PKG-INFO"} == wanted

    dated = re.search(r"^## \S+ \((.+)\)$", (tree / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dated is not None
    epoch = run("date", "--utc", f"--date={dated[1]}", "+%s").strip()
    pip = (sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-index")
    output = place / "wheel"
    run(
        *(*pip, "--no-build-isolation", "--wheel-dir", str(output), str(archive)),
        timeout_s=100,
        environment={"SOURCE_DATE_EPOCH": epoch},
    )
    name = f"imdsproxy-{_VERSION}-py3-none-any.whl"
    assert (output / name).read_bytes() == (released / name).read_bytes()


@pytest.mark.parametrize("python", ["python3.11", "python3.13"])
def test_pipx_runs_the_wheel(place: Path, tools: Path, released: Path, python: str) -> None:
    # Not every machine has both.
    interpreter = shutil.which(python) or sys.executable
    # The versions of the tests; pip takes no hashes for what it is to find by constraints.
    lines = (REPOSITORY / "requirements/runtime.txt").read_text().splitlines()
    pinned = [line.removesuffix(" \\") for line in lines if not line.startswith(" ")]
    constraints = place / "constraints.txt"
    constraints.write_text("\n".join(pinned))
    home = place / f"pipx-{python}"
    found = run(
        *(str(tools / "pipx"), "run", "--python", interpreter),
        *("--spec", str(released / f"imdsproxy-{_VERSION}-py3-none-any.whl")),
        *("imdsproxy", "--version"),
        cwd=place,
        timeout_s=300,
        environment={
            "PIPX_HOME": str(home),
            "PIP_CONSTRAINT": str(constraints),
            # Python compiles what it imports, which is a small part.
            "PIP_NO_COMPILE": "1",
        },
    )
    assert found == f"imdsproxy {_VERSION}\n"


def test_the_bill_of_materials_names_each_library_with_its_hashes(released: Path) -> None:
    bill = json.loads((released / f"imdsproxy-{_VERSION}.cdx.json").read_text())
    pinned = (REPOSITORY / "requirements/runtime.txt").read_text()
    wanted = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", pinned, re.MULTILINE))

    vendor = REPOSITORY / "src/imdsproxy/console/static/vendor"
    vendored = re.search(r"`htmx.org` ([0-9.]+),", (vendor / "README.md").read_text())
    assert vendored is not None

    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["version"] == _VERSION
    wanted["htmx.org"] = vendored[1]
    assert {one["name"]: one["version"] for one in bill["components"]} == wanted
    own = hashlib.sha256((vendor / "htmx.js").read_bytes()).hexdigest()
    hashes = [own, *re.findall(r"sha256:([0-9a-f]{64})", pinned)]
    text = json.dumps(bill["components"])
    assert [one for one in hashes if one not in text] == []


def test_the_rpm_builds_with_its_dependencies_and_rpmlint_finds_nothing(
    place: Path, released: Path
) -> None:
    source = released / f"imdsproxy-{_VERSION}-1.src.rpm"
    # What Fedora's macros do. rpm reads macros anew for a package without an architecture, those of --load not.
    path = re.search(r"^Macro path: (.+)$", run("rpm", "--showrc"), re.MULTILINE)
    assert path is not None
    run(
        *("rpmbuild", "--rebuild", "--nodeps"),
        *("--macros", f"{path[1]}:{REPOSITORY}/tests/support/rpm.macros"),
        *("--define", f"python3 {sys.executable}", "--define", f"_topdir {place}/rpm"),
        *("--define", f"_tmppath {place}", str(source)),
        timeout_s=_BUILD_S,
    )
    (built,) = (place / "rpm/RPMS/noarch").iterdir()
    query = ("rpm", "--query", "--nosignature", "--package", str(built))

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    required = run(*query, "--requires").splitlines()
    wanted = [re.split("[>=]", one)[0] for one in project["dependencies"]]
    missing = [one for one in wanted if not any(f"dist({one})" in line for line in required)]
    assert missing == []
    assert {"haproxy >= 3.0", "nftables"} <= set(required)
    control = (REPOSITORY / "packaging/debian/control").read_text()
    debians = re.findall(
        r"^ (python3-\S+?)(?:,| \()", control.partition("\nRecommends:")[2], re.MULTILINE
    )
    assert sorted(line.split()[0] for line in run(*query, "--recommends").splitlines()) == debians
    files = set(run(*query, "--list").splitlines())
    assert {"/usr/bin/imdsproxy", "/usr/lib/systemd/system/imdsproxy.service"} <= files
    scripts = re.split(r"^\w+ scriptlet.*\n", run(*query, "--scripts"), flags=re.MULTILINE)
    assert len(scripts) == 5
    for script in scripts:
        run("sh", "-n", "-c", script)
    configured = ("--config", str(REPOSITORY / "packaging/rpm/rpmlint.toml"))
    run("rpmlint", "--strict", *configured, str(source), str(built))


def test_nothing_is_built_of_a_tree_that_is_no_release_nor_signed_with_another_kind_of_key(
    place: Path, tree: Path, tools: Path, released: Path
) -> None:
    rsa = place / "rsa"
    run("ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(rsa))
    program = f'exec "{sys.executable}" script/release.py --tools "{tools}"'

    def refused(words: str) -> str:
        status, printed = run_script(f"{program} {words}", cwd=tree, home=place)
        assert status == 1
        return printed

    built = f"build {_VERSION} --output {place}/refused"
    assert "are version 1.0.0, not 9.9.9: run" in refused("build 9.9.9 --unsigned")
    assert "is no ed25519 key of ssh" in refused(f"{built} --key {rsa}")
    assert f"{released} exists: remove it" in refused(f"build {_VERSION} --unsigned")
    (tree / "forgotten").touch()
    wanted = "commit or remove this first:\n    ?? forgotten"
    assert wanted in refused(f"{built} --unsigned")
    assert wanted in refused("prepare 1.0.1")
    (tree / "forgotten").unlink()
    assert "has no section for 1.0.1 at its top" in refused("prepare 1.0.1")
    assert not (place / "refused").exists()
