"""The commands `imdsproxy takeover` and `imdsproxy handback`."""

import importlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from imdsproxy.cli import options
from imdsproxy.cli.options import argument, flag
from imdsproxy.cli.output import Output, clean
from imdsproxy.config import DEFAULT_CONFIG
from imdsproxy.errors import HostRefused, ImdsproxyError, Problem, RequestRefused, spell_count
from imdsproxy.tools.takeover.seen import Commands, Kind, Seen, shape_of_agent

if TYPE_CHECKING:
    from imdsproxy.tools.takeover.steps import Step, Takeover

KINDS: Final = ("ovn", "l3", "dhcp")
"""Kinds of takeover. Each is a module of that name with a `KIND`."""

_TIMEOUT_S: Final = 120.0
_NAMES: Final = "|".join(KINDS)
_BOTH: Final = "guests were served throughout"

What = Annotated[str, argument(_NAMES, "The agent to replace: OVN's, the L3 or the DHCP agent.")]
DryRun = Annotated[bool, flag("--dry-run", "Print the plan without any change.")]
StopAgent = Annotated[
    str,
    flag(
        "--stop-agent COMMAND",
        "Command that stops the agent permanently (default: disable and stop its systemd unit), as "
        "'docker stop NAME'.",
    ),
]
StartAgent = Annotated[
    str,
    flag(
        "--start-agent COMMAND",
        "Command that starts the agent again (default: enable and start its systemd unit).",
    ),
]
Restart = Annotated[
    str,
    flag(
        "--restart COMMAND",
        "Command that restarts imdsproxy's controller (default: restart its systemd unit).",
    ),
]
NamedAgent = Annotated[
    int | None,
    flag(
        "--agent PID",
        "Take this process for the agent, whatever unit or container it belongs to.",
    ),
]
Yes = Annotated[bool, flag("--yes", "Carry out the plan without a question.")]
Timeout = Annotated[
    float,
    flag("--timeout SECONDS", f"Longest duration of one step (default: {_TIMEOUT_S:.0f})."),
]


@options.host_command
def takeover(
    run: options.Invocation,
    what: What,
    *,
    dry_run: DryRun = False,
    yes: Yes = False,
    agent: NamedAgent = None,
    stop_agent: StopAgent = "",
    start_agent: StartAgent = "",
    restart: Restart = "",
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Replace a running Neutron metadata agent without losing requests. Prints the plan, then the result."""
    kind, seen = _observe(run, what, Commands(stop_agent, start_agent, restart), agent)
    plan = _Plan(
        f"takeover {what}",
        tuple(kind.takeover(seen)),
        (*kind.refuse(seen), *_lacks_commands(kind, seen), *_lacks_belief(seen)),
        seen,
        remembers={kind.name: seen} if seen.agents else {},
    )
    return _carry_out(run, plan, None if dry_run else timeout, asks=not yes)


@options.host_command
def handback(
    run: options.Invocation,
    what: What,
    *,
    dry_run: DryRun = False,
    yes: Yes = False,
    agent: NamedAgent = None,
    start_agent: StartAgent = "",
    restart: Restart = "",
    timeout: Timeout = _TIMEOUT_S,
) -> int:
    """Hand the networks back to Neutron's agent without losing requests. Prints the plan, then the result."""
    kind, seen = _observe(run, what, Commands("", start_agent, restart), agent)
    steps = tuple(kind.handback(seen))
    problems = (*_lacks_commands(kind, seen, back=True), *_lacks_belief(seen)) if steps else ()
    plan = _Plan(f"handback {what}", steps, problems, seen, forgets=kind.name)
    return _carry_out(run, plan, None if dry_run else timeout, asks=not yes)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Steps and problems of one run of a command.

    Attributes:
        remembers: Observed states, by kind, whose commands and files a handback needs.
        forgets: Kind whose saved commands and files are removed at the end.
    """

    name: str
    steps: "tuple[Step, ...]"
    problems: tuple[Problem, ...]
    seen: Seen
    remembers: Mapping[str, Seen] = field(default_factory=dict)
    forgets: str = ""


def _observe(
    run: options.Invocation, what: str, given: Commands, named: int | None
) -> "tuple[Takeover, Seen]":
    from imdsproxy.tools.takeover.observe import observe

    if what not in KINDS:
        raise RequestRefused(f"there is no agent {what}", hint=f"one of {', '.join(KINDS)}")
    kind: Takeover = importlib.import_module(f"imdsproxy.tools.takeover.{what}").KIND
    directory = (run.config or DEFAULT_CONFIG).absolute().parent
    seen = observe(kind, run.daemon(), run.load(), directory=directory, given=given, named=named)
    return kind, seen


def _lacks_commands(kind: Kind, seen: Seen, *, back: bool = False) -> Iterator[Problem]:
    if not seen.commands.restart:
        yield Problem(
            "--restart",
            "imdsproxy's controller has no systemd unit",
            "name the command, as --restart 'podman restart imdsproxy'",
        )
    if back and not seen.agents and not seen.commands.start:
        yield Problem("--start-agent", "the command that starts the agent is not known", "name it")
    if kind.runs_on:
        return
    if not back and seen.agents and not (seen.commands.stop and seen.commands.start):
        agent = seen.agents[0]
        yield Problem(
            "--stop-agent and --start-agent",
            f"{agent.program} (pid {agent.pid}) has no systemd unit",
            "name the commands, as --stop-agent 'docker stop NAME' --start-agent 'docker start NAME'",
        )


def _lacks_belief(seen: Seen) -> Iterator[Problem]:
    """Yield a problem for each untrusted process if no agent was found; only the operator can decide."""
    for suspect in () if seen.agents else seen.suspects:
        yield Problem(
            f"process {suspect.pid}",
            f"the process looks like {suspect.program}, but cannot be trusted: {suspect.reason}",
            f"if it is the agent, use --agent {suspect.pid}; otherwise end it",
        )


def _carry_out(run: options.Invocation, plan: _Plan, timeout_s: float | None, *, asks: bool) -> int:
    """Print the plan, then ask, act and report, unless `timeout_s` is `None` (a dry run)."""
    from imdsproxy.tools.takeover.observe import remember

    output = run.output
    if plan.problems:
        raise HostRefused(f"{plan.name} cannot start", problems=plan.problems)
    if not output.as_json:
        _show_plan(output, plan)
    report: list[Mapping[str, str]] = []
    if timeout_s is not None and plan.steps:
        if asks and not output.confirm("Carry out this plan", instead="--yes"):
            output.text("nothing was done")
            return options.NO
        state = run.settings.paths.state_dir
        for kind, seen in plan.remembers.items():
            remember(state, kind, seen)
        report = list(_act(run, plan, timeout_s))
        if plan.forgets:
            remember(state, plan.forgets, None)
    if output.as_json:
        output.json(
            {
                "agents": [dict(shape_of_agent(agent)) for agent in plan.seen.agents],
                "files": list(plan.seen.files),
                "plan": [dict(one.shape) for one in plan.steps],
                "report": report,
            }
        )
    elif report:
        output.styled(f"[green]{plan.name} is done[/]; {_BOTH}")
    return options.OK


def _act(run: options.Invocation, plan: _Plan, timeout_s: float) -> Iterator[Mapping[str, str]]:
    from imdsproxy.tools.takeover.actor import Actor

    actor = Actor(run.daemon(), run.load, timeout_s)
    for number, step in enumerate(plan.steps, 1):
        began = time.monotonic()
        try:
            with run.output.waiting(clean(step.words)):
                result = step.run(actor)
        except ImdsproxyError as error:
            raise _stopped(plan, number, error) from error
        took = f"{time.monotonic() - began:.1f}"
        if not run.output.as_json:
            run.output.styled(f"{number}. [green]done[/] in {took} s: {clean(result)}")
        yield {"step": step.words, "result": result, "took_s": took}


def _show_plan(output: Output, plan: _Plan) -> None:
    if not plan.steps:
        output.styled(f"{plan.name}: nothing is left to do")
        return
    output.styled(f"[bold]{plan.name}[/]: {spell_count(len(plan.steps), 'step')}")
    for agent in plan.seen.agents:
        shown = f"{agent.program} (pid {agent.pid}, user {agent.account}, {agent.place})"
        output.styled(f"[dim]agent:[/] {clean(shown)}")
    for path in plan.seen.files:
        output.styled(f"[dim]settings file:[/] {clean(path)}")
    for suspect in plan.seen.suspects:
        shown = f"process {suspect.pid} looks like {suspect.program}, but {suspect.reason}"
        output.styled(f"[yellow]ignored:[/] {clean(shown)}")
    for number, step in enumerate(plan.steps, 1):
        output.styled(f"{number}. {clean(step.words)}")
        output.styled(f"   [dim]by hand:[/] {clean(step.by_hand)}")
        if step.undo:
            output.styled(f"   [dim]undo:[/] {clean(step.undo)}")
    output.styled("")


def _stopped(plan: _Plan, number: int, error: ImdsproxyError) -> HostRefused:
    done = (
        f"{spell_count(number - 1, 'step')} before this step done"
        if number > 1
        else "nothing was done"
    )
    return HostRefused(
        f"step {number} of {len(plan.steps)} of {plan.name} failed: {error.message}; {done}, and {_BOTH}",
        hint=error.hint
        or f"fix the cause, and run `imdsproxy {plan.name}` again: it continues from here",
        problems=error.problems,
    )
