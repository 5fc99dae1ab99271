"""The commands `imdsproxy takeover` and `imdsproxy handback`."""

import importlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from imdsproxy.cli import options
from imdsproxy.cli.options import argument, flag
from imdsproxy.cli.output import Output, clean
from imdsproxy.config.files import DEFAULT_CONFIG
from imdsproxy.errors import HostRefused, ImdsproxyError, Problem, RequestRefused, spell_count
from imdsproxy.tools.takeover.seen import Commands, Kind, Seen, shape_of_agent

if TYPE_CHECKING:
    from imdsproxy.tools.takeover.steps import Step, Takeover

KINDS: Final = ("ovn", "l3", "dhcp")
"""Kinds of takeover. Each is a module of that name with a `KIND`."""

_TIMEOUT_S: Final = 120.0
_NAMES: Final = "|".join(KINDS)
_BOTH: Final = "guests are served all the while"

What = Annotated[str, argument(_NAMES, "Whose networks: those of OVN's, the L3 or the DHCP agent.")]
DryRun = Annotated[bool, flag("--dry-run", "Print the plan, and change nothing.")]
StopAgent = Annotated[
    str,
    flag(
        "--stop-agent COMMAND",
        "Stops the agent for good (default: disables and stops its unit of systemd); 'docker stop NAME' for a "
        "container.",
    ),
]
StartAgent = Annotated[
    str, flag("--start-agent COMMAND", "Starts it again (default: enables and starts its unit).")
]
Restart = Annotated[
    str, flag("--restart COMMAND", "Restarts imdsproxy's controller (default: its unit).")
]
NamedAgent = Annotated[
    int | None,
    flag(
        "--agent PID",
        "This process is the agent, whatever unit or container it belongs to.",
    ),
]
Yes = Annotated[bool, flag("--yes", "Do what the plan says without a question.")]
Timeout = Annotated[
    float,
    flag("--timeout SECONDS", f"The longest wait of one step (default: {_TIMEOUT_S:.0f})."),
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
        name: The command, in words.
        problems: Problems that prevent the start.
        seen: Observed state that the plan is based on.
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
        raise RequestRefused(f"there is no takeover of {what}", hint=f"one of {', '.join(KINDS)}")
    kind: Takeover = importlib.import_module(f"imdsproxy.tools.takeover.{what}").KIND
    directory = (run.config or DEFAULT_CONFIG).absolute().parent
    seen = observe(kind, run.daemon(), run.load(), directory=directory, given=given, named=named)
    return kind, seen


def _lacks_commands(kind: Kind, seen: Seen, *, back: bool = False) -> Iterator[Problem]:
    if not seen.commands.restart:
        yield Problem(
            "--restart",
            "imdsproxy's controller has no unit of systemd",
            "--restart 'podman restart imdsproxy'",
        )
    if back and not seen.agents and not seen.commands.start:
        yield Problem(
            "--start-agent", "it is not known how the agent is started", "give the command"
        )
    if kind.runs_on:
        return
    if not back and seen.agents and not (seen.commands.stop and seen.commands.start):
        agent = seen.agents[0]
        yield Problem(
            "--stop-agent and --start-agent",
            f"{agent.program} (pid {agent.pid}) has no unit of systemd",
            "--stop-agent 'docker stop NAME' --start-agent 'docker start NAME'",
        )


def _lacks_belief(seen: Seen) -> Iterator[Problem]:
    """Yield a problem for each untrusted process if no agent was found; only the operator can decide."""
    for suspect in () if seen.agents else seen.suspects:
        yield Problem(
            f"process {suspect.pid}",
            f"looks like {suspect.program}, and is not believed: {suspect.reason}",
            f"--agent {suspect.pid} if it is the agent, else end it",
        )


def _carry_out(run: options.Invocation, plan: _Plan, timeout_s: float | None, *, asks: bool) -> int:
    """Print the plan, then ask, act and report, unless `timeout_s` is `None` (a dry run)."""
    from imdsproxy.tools.takeover.observe import remember

    output = run.output
    if plan.problems:
        raise HostRefused(f"{plan.name} cannot begin", problems=plan.problems)
    if not output.as_json:
        _show_plan(output, plan)
    report: list[Mapping[str, str]] = []
    if timeout_s is not None and plan.steps:
        if asks and not output.confirm("Do this", instead="--yes"):
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
        output.styled(f"{plan.name}: all is done already")
        return
    output.styled(f"[bold]{plan.name}[/]: {spell_count(len(plan.steps), 'step')}")
    for agent in plan.seen.agents:
        shown = f"{agent.program} (pid {agent.pid}, user {agent.account}, {agent.place})"
        output.styled(f"[dim]agent:[/] {clean(shown)}")
    for path in plan.seen.files:
        output.styled(f"[dim]its settings, which are read:[/] {clean(path)}")
    for suspect in plan.seen.suspects:
        shown = f"process {suspect.pid}, which looks like {suspect.program}: {suspect.reason}"
        output.styled(f"[yellow]ignored:[/] {clean(shown)}")
    for number, step in enumerate(plan.steps, 1):
        output.styled(f"{number}. {clean(step.words)}")
        output.styled(f"   [dim]by hand:[/] {clean(step.by_hand)}")
        if step.undo:
            output.styled(f"   [dim]undone by:[/] {clean(step.undo)}")
    output.styled("")


def _stopped(plan: _Plan, number: int, error: ImdsproxyError) -> HostRefused:
    done = f"{spell_count(number - 1, 'step')} before it done" if number > 1 else "nothing was done"
    return HostRefused(
        f"step {number} of {len(plan.steps)} of {plan.name} failed: {error.message}; {done}, and {_BOTH}",
        hint=error.hint or f"mend it, and run `imdsproxy {plan.name}` again: it goes on from here",
        problems=error.problems,
    )
