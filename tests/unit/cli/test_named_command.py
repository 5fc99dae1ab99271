"""Which command a command line names, before anything of it is loaded."""

from __future__ import annotations

import pytest
import typer.main

from imdsproxy.cli.main import COMMANDS, build_app, named_command


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("run", "run"),
        ("--config run status", "status"),
        ("-c run -s stop --json get --from 10.0.0.5", "get"),
        ("--config=run check", "check"),
        ("namespace-proxy --network-id run", "namespace-proxy"),
        ("network list", "network"),
        ("--json tokens report", "token"),
        ("", None),
        ("--config", None),
        ("-h run", None),
        ("-- run", None),
        ("rum", None),
    ],
)
def test_the_first_word_that_is_no_options_names_it(line: str, named: str | None) -> None:
    assert named_command(line.split()) == named


def test_the_whole_program_has_every_command_and_one_alone_has_itself() -> None:
    whole = typer.main.get_command(build_app())
    assert list(whole.commands) == sorted(COMMANDS, key=list(whole.commands).index)  # type: ignore[attr-defined]  # a group
    assert set(whole.commands) == set(COMMANDS)  # type: ignore[attr-defined]  # as above
    one = typer.main.get_command(build_app(["run"]))
    assert set(one.commands) == {"run"}  # type: ignore[attr-defined]  # as above
