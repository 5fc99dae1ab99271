"""Make a release; `script/release` installs the tools and runs this module. See docs/how-to/release.md."""

import argparse
import datetime as dt
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_INIT: Final = Path("src/imdsproxy/__init__.py")
_CHANGELOG: Final = Path("CHANGELOG.md")
_VENDORED: Final = Path("src/imdsproxy/console/static/vendor/README.md")
_SIGNED_AS: Final = "imdsproxy-release"
"""The namespace of signatures: a signature for another purpose does not verify."""
_UNRELEASED: Final = "unreleased"
_HEADING: Final = re.compile(r"^## (\S+) \((.+)\)$", re.MULTILINE)
_VERSION: Final = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)


class Refused(Exception):
    """A release is not possible; the message has the reason and the remedy."""


@dataclass(frozen=True, slots=True)
class Section:
    """A version's section of the changelog.

    Attributes:
        date: Date of the release, or `unreleased`.
        text: Text without the heading.
    """

    version: str
    date: str
    text: str


def parse_changelog(changelog: str) -> list[Section]:
    """Return the sections of a changelog, the newest first."""
    found = list(_HEADING.finditer(changelog))
    # Each heading splits off version and date between the texts before and after it.
    texts = _HEADING.split(changelog)[3::3]
    return [
        Section(one[1], one[2], text.strip() + "\n") for one, text in zip(found, texts, strict=True)
    ]


def plan_prepare(changelog: str, init: str, version: str, date: str) -> tuple[str, str]:
    """Return changelog and `__init__.py` for a version that is released on a date.

    Raises:
        Refused: The changelog's first section is not this version's, or the version is released already.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise Refused(f"{version!r} is no version: give three numbers, as 1.2.0")
    sections = parse_changelog(changelog)
    if not sections or sections[0].version != version:
        newest = sections[0].version if sections else "none"
        raise Refused(
            f"CHANGELOG.md has no section for {version} at its top (there is: {newest}): "
            f"write '## {version} ({_UNRELEASED})' and below it what a user notices"
        )
    first, before = sections[0], sections[1:]
    if first.date != _UNRELEASED:
        raise Refused(f"{version} was released on {first.date}: the next needs another version")
    if "\n- " not in f"\n{first.text}":
        raise Refused(f"CHANGELOG.md says nothing of {version}: write what a user notices")
    if before and _numbers(before[0].version) >= _numbers(version):
        raise Refused(f"{version} is not later than {before[0].version}, which is released")
    heading = f"## {version} ({{}})"
    return (
        changelog.replace(heading.format(_UNRELEASED), heading.format(date), 1),
        _VERSION.sub(f'__version__ = "{version}"', init),
    )


def check_release(changelog: str, init: str, version: str) -> Section:
    """Return the section of a version that is ready to be built.

    Raises:
        Refused: The sources are of another version, or `prepare` was not run for this version.
    """
    own = _VERSION.search(init)
    if own is None or own[1] != version:
        raise Refused(
            f"these sources are version {own[1] if own else 'none'}, not {version}: "
            f"run script/release prepare {version} and commit, or check out its tag"
        )
    section = next((one for one in parse_changelog(changelog) if one.version == version), None)
    if section is None or not re.fullmatch(r"\d{4}-\d\d-\d\d", section.date):
        raise Refused(
            f"CHANGELOG.md has no section '## {version} (DATE)': "
            f"run script/release prepare {version} and commit"
        )
    return section


def add_vendored(bill: str, readme: str) -> str:
    """Return a bill of materials with the npm package that a README of vendored files describes.

    Raises:
        Refused: The README names no package with its licence and hash.
    """
    package = re.search(r"npm package `(\S+)` ([\d.]+\d)", readme)
    digest = re.search(r"SHA-256 \| `([0-9a-f]{64})`", readme)
    if package is None or digest is None:
        raise Refused(f"{_VENDORED} no longer says which npm package and SHA-256 the file has")
    purl = f"pkg:npm/{package[1]}@{package[2]}"
    component = {
        "bom-ref": purl,
        "hashes": [{"alg": "SHA-256", "content": digest[1]}],
        "licenses": [{"license": {"id": "0BSD"}}],
        "name": package[1],
        "purl": purl,
        "type": "library",
        "version": package[2],
    }
    parsed = json.loads(bill)
    parsed["components"].append(component)
    return json.dumps(parsed, indent=2, sort_keys=True) + "\n"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def prepare(version: str, date: str) -> None:
    """Write version and date into the sources."""
    _need_clean_tree()
    changelog, init = plan_prepare(_read(_CHANGELOG), _read(_INIT), version, date)
    (_REPOSITORY / _CHANGELOG).write_text(changelog, "utf-8")
    (_REPOSITORY / _INIT).write_text(init, "utf-8")
    sys.stdout.write(
        f"{_CHANGELOG} and {_INIT} say {version} of {date}: read the difference, and commit it\n"
    )


def build(version: str, key: Path | None, output: Path, tools: Path) -> None:
    """Make all files of a release in a directory that must not exist yet."""
    _need_clean_tree()
    section = check_release(_read(_CHANGELOG), _read(_INIT), version)
    if output.exists():
        raise Refused(f"{output} exists: remove it, or give another --output")
    if key is not None:
        _need_key(key)
    # The date of the release replaces the clock, so that builds are equal.
    epoch = int(dt.datetime.fromisoformat(f"{section.date}T00:00:00+00:00").timestamp())
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": str(epoch),
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONWARNINGS": "ignore",
    }
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="imdsproxy-release-") as name:
        work = Path(name)
        made = work / "made"
        made.mkdir()
        _make_all(work, made, version, tools, environment)
        (made / f"imdsproxy-{version}.changes.md").write_text(section.text, "utf-8")
        sums = made / "SHA256SUMS"
        sums.write_text(_checksums(made), "utf-8")
        if key is not None:
            _run("ssh-keygen", "-q", "-Y", "sign", "-n", _SIGNED_AS, "-f", str(key), str(sums))
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, output)
    for path in sorted(output.iterdir()):
        sys.stdout.write(f"{path}\n")
    if key is None:
        sys.stderr.write("SHA256SUMS is not signed: others cannot verify this\n")


def _make_all(
    work: Path, made: Path, version: str, tools: Path, environment: dict[str, str]
) -> None:
    """Make all files except checksums: first the source archive from the commit, then all others from the archive."""
    name = f"imdsproxy-{version}"
    exported = work / "exported"
    exported.mkdir()
    archive = work / "commit.tar"
    _run("git", "-C", str(_REPOSITORY), "archive", "--output", str(archive), "HEAD")
    _run("tar", "--extract", "--file", str(archive), "--directory", str(exported))
    python = (sys.executable, "-I", "-m", "hatchling", "build")
    _run(*python, "--target", "sdist", "--directory", str(made), cwd=exported, env=environment)
    source = made / f"{name}.tar.gz"
    _run("tar", "--extract", "--file", str(source), "--directory", str(work))
    build_script = work / name / "packaging/build"
    _run(str(build_script), sys.executable, str(made), env=environment)
    _run(str(work / name / "packaging/rpm/build-source"), str(source), str(made), env=environment)
    project = work / "pyproject.toml"
    declared = (work / name / "pyproject.toml").read_text("utf-8")
    project.write_text(declared.replace('dynamic = ["version"]', f'version = "{version}"'))
    _run(
        *(str(tools / "cyclonedx-py"), "requirements", "requirements/runtime.txt"),
        *("--pyproject", str(project)),
        *("--output-reproducible", "--spec-version", "1.6", "--output-format", "JSON"),
        *("--output-file", str(made / f"{name}.cdx.json")),
        cwd=work / name,
        env=environment,
    )
    bill = made / f"{name}.cdx.json"
    vendored = (work / name / _VENDORED).read_text("utf-8")
    bill.write_text(add_vendored(bill.read_text("utf-8"), vendored), "utf-8")
    uploaded = [str(made / f"{name}.tar.gz"), str(made / f"{name}-py3-none-any.whl")]
    _run(str(tools / "twine"), "check", "--strict", *uploaded, env=environment)


def _checksums(directory: Path) -> str:
    """Return checksums in the format of `sha256sum`."""
    paths = sorted(directory.iterdir())
    return "".join(f"{hashlib.sha256(one.read_bytes()).hexdigest()}  {one.name}\n" for one in paths)


def _need_clean_tree() -> None:
    git = ("git", "-C", str(_REPOSITORY), "status", "--porcelain")
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused("a release is made of a commit, and this is no work tree of git")
    if done.stdout:
        first = "".join(f"\n    {line}" for line in done.stdout.splitlines()[:10])
        raise Refused(f"the work tree differs from its commit: commit or remove this first:{first}")


def _need_key(key: Path) -> None:
    asking = ("/usr/bin/ssh-keygen", "-l", "-f", str(key))
    done = subprocess.run(asking, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "(ED25519)" not in done.stdout:
        raise Refused(
            f"{key} is no ed25519 key of ssh, and only their signatures are the same each time: "
            "ssh-keygen -t ed25519 makes one"
        )


def _run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = " ".join(command[:4])
        raise Refused(f"'{words} …' ended with {done.returncode}:\n{done.stdout[-3000:]}")


def _read(path: Path) -> str:
    return (_REPOSITORY / path).read_text("utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="script/release", description="Make a release.")
    parser.add_argument("--tools", type=Path, required=True, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="write version and date into the sources")
    building = commands.add_parser(
        "build", help="make the files of a release, equal bytes each time"
    )
    for one in (preparing, building):
        one.add_argument("version")
    today = dt.datetime.now(dt.UTC).date()
    preparing.add_argument("--date", type=dt.date.fromisoformat, default=today)
    signing = building.add_mutually_exclusive_group(required=True)
    signing.add_argument("--key", type=Path, help="ssh's private ed25519 key that signs SHA256SUMS")
    signing.add_argument("--unsigned", action="store_true", help="to compare with another's build")
    building.add_argument("--output", type=Path, help="default: dist/VERSION")
    words = parser.parse_args(arguments)
    try:
        if words.command == "prepare":
            prepare(words.version, words.date.isoformat())
        else:
            output = words.output or _REPOSITORY / "dist" / words.version
            build(words.version, words.key, output.absolute(), words.tools)
    except Refused as refused:
        sys.stderr.write(f"script/release: {refused}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
