"""What `imdsproxy snippet` prints, pasted, and looked at by cloud-init's genuine ds-identify."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from imdsproxy.core.model import Dialect
from imdsproxy.core.snippets import HINTS, Target
from imdsproxy.core.snippets.targets import render_snippet
from support.ds_identify import Machine, identify
from support.snippet_guests import guest
from support.snippet_text import container_of, machine_of

_SOURCE = {Dialect.OPENSTACK: "OpenStack", Dialect.NOCLOUD: "NoCloud", Dialect.EC2: "Ec2"}

every = pytest.mark.parametrize(
    ("target", "dialect"), list(itertools.product(Target, Dialect)), ids=str
)


@every
def test_a_machine_with_the_snippet_asks_for_that_dialect_and_no_other(
    target: Target, dialect: Dialect, tmp_path: Path
) -> None:
    machine = machine_of(render_snippet(guest(), target, dialect))

    assert identify(machine, tmp_path) == [_SOURCE[dialect]]


def test_a_machine_without_it_asks_nobody(tmp_path: Path) -> None:
    assert identify(Machine(), tmp_path) == []


@every
def test_a_uuid_that_looks_like_amazons_leads_nowhere_else(
    target: Target, dialect: Dialect, tmp_path: Path
) -> None:
    for number, uuid in enumerate(
        ("ec2e1916-9099-4caf-8d21-012345abcdef", "45e12aec-dcd1-4213-94ed-012345abcdef")
    ):
        machine = machine_of(render_snippet(guest(uuid=uuid), target, dialect))
        assert identify(Machine({"product_uuid": uuid}), tmp_path / f"{number}-bare") == ["Ec2"]
        assert identify(machine, tmp_path / str(number)) == [_SOURCE[dialect]]


@pytest.mark.parametrize("dialect", list(Dialect))
def test_the_word_for_the_kernel_command_line_opens_the_gate_too(
    dialect: Dialect, tmp_path: Path
) -> None:
    found = identify(Machine(kernel=f"root=/dev/vda1 {HINTS[dialect].kernel} quiet"), tmp_path)

    assert [one.lower() for one in found] == [dialect]


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_container_of_incus_asks_as_well(dialect: Dialect, tmp_path: Path) -> None:
    machine = container_of(render_snippet(guest(), Target.INCUS, dialect))

    assert [one.lower() for one in identify(machine, tmp_path)] == [dialect]


def test_a_container_without_it_asks_nobody(tmp_path: Path) -> None:
    assert identify(Machine(virtualization="container:lxc"), tmp_path) == []


def test_an_image_that_incus_seeds_takes_nocloud_which_is_the_default_there(tmp_path: Path) -> None:
    for number, dialect in enumerate((Dialect.NOCLOUD, Dialect.OPENSTACK)):
        bare = machine_of(render_snippet(guest(), Target.INCUS, dialect))
        machine = Machine(bare.dmi, seeded=True)
        assert identify(machine, tmp_path / str(number))[0] == "NoCloud"
