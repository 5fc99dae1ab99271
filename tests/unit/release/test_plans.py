"""What a release writes into the sources, and of what it is not made."""

import pytest

from script.release import Refused, check_release, parse_changelog, plan_prepare

INIT = '__all__ = ["__version__"]\n\n__version__ = "0.1.0"\n'
CHANGELOG = """# Changelog

## 0.2.0 (unreleased)

- New.

## 0.1.0 (2026-01-31)

First.
"""


def test_prepared_changelog_and_program_say_version_and_date() -> None:
    changelog, init = plan_prepare(CHANGELOG, INIT, "0.2.0", "2026-02-03")

    assert changelog == CHANGELOG.replace("0.2.0 (unreleased)", "0.2.0 (2026-02-03)")
    assert init == INIT.replace("0.1.0", "0.2.0")
    assert check_release(changelog, init, "0.2.0") == parse_changelog(changelog)[0]
    assert parse_changelog(changelog)[0].text == "- New.\n"


@pytest.mark.parametrize(
    ("version", "changelog", "why"),
    [
        ("0.2", CHANGELOG, "'0.2' is no version: give three numbers"),
        ("0.3.0", CHANGELOG, r"no section for 0.3.0 at its top \(there is: 0.2.0\)"),
        ("0.2.0", "# Changelog\n", r"\(there is: none\)"),
        ("0.2.0", CHANGELOG.replace("unreleased", "2026-02-01"), "was released on 2026-02-01"),
        ("0.2.0", CHANGELOG.replace("- New.", ""), "says nothing of 0.2.0"),
        ("0.1.0", CHANGELOG.replace("0.2.0", "0.1.0"), "0.1.0 is not later than 0.1.0"),
        ("0.9.0", CHANGELOG.replace("0.2", "0.9").replace("0.1", "0.10"), "not later than 0.10.0"),
    ],
)
def test_what_is_no_next_version_is_refused(version: str, changelog: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        plan_prepare(changelog, INIT, version, "2026-02-03")


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("0.2.0", "these sources are version 0.1.0, not 0.2.0"),
        ("0.1.0", r"no section '## 0.1.0 \(DATE\)'"),
    ],
)
def test_what_was_not_prepared_is_not_built(version: str, why: str) -> None:
    for date in ("unreleased", "soon"):
        with pytest.raises(Refused, match=why):
            check_release(CHANGELOG.replace("2026-01-31", date), INIT, version)
