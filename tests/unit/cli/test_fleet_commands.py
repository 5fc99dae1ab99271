"""`imdsproxy fleet`: the files that it makes, and what it refuses."""

import asyncio
import shlex
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from imdsproxy.cli.main import EXAMPLES, build_program, iterate_commands
from imdsproxy.errors import ConfigInvalid
from imdsproxy.fleet.layout import HostId, host_key
from imdsproxy.fleet.members import Role
from imdsproxy.host.certificates import fingerprint, parse_certificate, render_certificate
from imdsproxy.hub.pki.authority import HUB_LIFE, make_authority
from imdsproxy.hub.pki.files import (
    FleetFiles,
    make_renewed_hub,
    read_hub_names,
    refuse_shared_authority,
)
from imdsproxy.hub.store.journal import FILE, Journal
from support.cli import Ran, run_main


class _Fleet:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = FleetFiles(directory / "fleet")

    def __call__(self, command: str, *words: str) -> Ran:
        return run_main("fleet", command, *words, "--directory", str(self.files.directory))

    def init(self, *words: str) -> Ran:
        return self("init", "--name", "hub-1", "--address", "hub1.example.net", "-a", "::1", *words)


@pytest.fixture
def fleet(tmp_path: Path) -> _Fleet:
    return _Fleet(tmp_path)


def _modes(directory: Path) -> dict[str, str]:
    return {one.name: oct(one.stat().st_mode)[-3:] for one in directory.iterdir()}


def test_a_fleet_is_made_once_with_secrets_for_its_account_only(fleet: _Fleet) -> None:
    made = fleet.init("--json")
    assert made.status == 0, made
    authority = fleet.files.load_authority()
    assert made.json["fingerprint"] == authority.fingerprint
    assert "PRIVATE" not in made.out + made.err
    secret = dict.fromkeys(("ca.key", "hub.pem", "envelope.key", "operator.pem"), "600")
    assert _modes(fleet.files.directory) == {"ca.crt": "644", **secret}
    assert oct(fleet.files.directory.stat().st_mode)[-3:] == "700"
    names = read_hub_names(fleet.files.load_hub())
    assert (names.name, names.addresses) == ("hub-1", ("hub1.example.net", "::1"))
    fleet.files.load_envelope()
    again = fleet.init()
    assert (again.status, "exists already" in again.err) == (73, True)
    assert fleet.files.load_authority().certificate == authority.certificate


def test_a_fleet_can_have_a_ca_that_is_given(fleet: _Fleet, tmp_path: Path) -> None:
    fleet.init()
    given = fleet.files
    fleet.files = FleetFiles(tmp_path / "second")
    ca = ("--ca-certificate", str(given.ca_certificate))
    assert fleet.init(*ca).status == 64
    assert fleet.init(*ca, "--ca-key", str(given.hub)).status == 78
    assert not fleet.files.directory.exists()
    made = fleet.init(*ca, "--ca-key", str(given.ca_key))
    assert made.status == 0, made
    assert fleet.files.ca_key.read_bytes() == given.ca_key.read_bytes()
    fleet.files.load_authority()
    assert fleet.files.envelope_key.read_bytes() != given.envelope_key.read_bytes()


def test_a_further_hub_gets_the_same_secrets_and_a_certificate_of_its_own(
    fleet: _Fleet, tmp_path: Path
) -> None:
    fleet.init()
    other = FleetFiles(tmp_path / "hub-2")
    words = ("--name", "hub-2", "--address", "192.0.2.2", "--output", str(other.directory))
    made = fleet("hub-certificate", *words)
    assert made.status == 0, made
    other.load_authority()
    assert other.ca_key.read_bytes() == fleet.files.ca_key.read_bytes()
    assert other.load_envelope() == fleet.files.load_envelope()
    assert read_hub_names(other.load_hub()).addresses == ("192.0.2.2",)
    assert _modes(other.directory).keys() == _modes(fleet.files.directory).keys() - {"operator.pem"}
    assert fleet("hub-certificate", *words).status == 73


def test_an_operator_gets_one_file_with_all_that_tls_needs(fleet: _Fleet, tmp_path: Path) -> None:
    fleet.init()
    path = tmp_path / "anna.pem"
    made = fleet("operator", "anna", "--role", "mover", "--project", "p-1", "-o", str(path))
    assert "`imdsproxy grant show p-1`" in made.words
    assert made.status == 0, made
    assert oct(path.stat().st_mode)[-3:] == "600"
    context = ssl.create_default_context(cafile=str(path))
    context.load_cert_chain(path)
    own, ca = x509.load_pem_x509_certificates(path.read_bytes())
    names = {one.rfc4514_attribute_name: one.value for one in own.subject}
    assert names == {"O": "p-1", "OU": Role.MOVER, "CN": "anna"}
    assert fingerprint(ca) == fleet.files.load_authority().fingerprint
    for words, status in (
        (("anna", "-o", str(path)), 73),
        (("a b", "-o", str(tmp_path / "x.pem")), 64),
        (("ben", "--role", "host", "-o", str(tmp_path / "x.pem")), 64),
        (("ben", "--role", "hub", "-o", str(tmp_path / "x.pem")), 64),
        (("ben", "--project", "p/1", "-o", str(tmp_path / "x.pem")), 64),
    ):
        assert fleet("operator", *words).status == status, words
    assert not (tmp_path / "x.pem").exists()


def test_neither_an_operator_nor_a_hub_gets_the_name_of_a_host_that_the_hubs_journal_has(
    fleet: _Fleet, tmp_path: Path
) -> None:
    async def write() -> None:
        journal = Journal(tmp_path / "state" / FILE)
        await journal.open()
        await journal.keep({host_key(HostId("host-1")): b"{}"})
        await journal.close()

    fleet.init()
    asyncio.run(write())
    config = tmp_path / "imdsproxy.yaml"
    config.write_text(f"hub:\n  state_dir: {tmp_path / 'state'}\n")
    where = ("--directory", str(fleet.files.directory), "--output", str(tmp_path / "new"))
    hub = ("hub-certificate", "--address", "hub2.example.net", "--name")
    for words in (("operator", "host-1"), (*hub, "host-1")):
        ran = run_main("--config", str(config), "fleet", *words, *where)
        assert ran.status == 73, ran
        assert "host-1 is already the name of a host" in ran.err
    assert not (tmp_path / "new").exists()
    assert run_main("--config", str(config), "fleet", *hub, "hub-2", *where).status == 0


def test_a_directory_that_is_no_fleets_or_whose_key_others_can_read_is_refused(
    fleet: _Fleet, tmp_path: Path
) -> None:
    words = ("operator", "anna", "-o", str(tmp_path / "anna.pem"))
    none = fleet(*words)
    assert (none.status, "fleet init" in none.err) == (78, True)
    fleet.init()
    fleet.files.ca_key.chmod(0o644)
    open_to_all = fleet(*words)
    assert (open_to_all.status, "0644" in open_to_all.err) == (78, True)


def test_etcd_may_not_have_the_fleets_ca(fleet: _Fleet, tmp_path: Path) -> None:
    fleet.init()
    authority = fleet.files.load_authority()
    own, both = tmp_path / "own.crt", tmp_path / "both.crt"
    own.write_bytes(render_certificate(make_authority("etcd", datetime.now(UTC)).certificate))
    both.write_bytes(own.read_bytes() + fleet.files.ca_certificate.read_bytes())
    refuse_shared_authority(authority, own)
    for path in (fleet.files.ca_certificate, both):
        with pytest.raises(ConfigInvalid, match="let every host in"):
            refuse_shared_authority(authority, path)


def test_a_hub_renews_its_certificate_with_its_names_after_two_thirds_of_its_life(
    fleet: _Fleet,
) -> None:
    fleet.init()
    authority, now = fleet.files.load_authority(), datetime.now(UTC)
    before = fleet.files.load_hub()
    assert make_renewed_hub(fleet.files, authority, now + HUB_LIFE / 2) is None
    pem = make_renewed_hub(fleet.files, authority, now + HUB_LIFE * 3 / 4)
    assert pem is not None
    after = parse_certificate(pem, "renewed")
    assert read_hub_names(after) == read_hub_names(before)
    assert after.public_key() != before.public_key()
    assert after.not_valid_after_utc > before.not_valid_after_utc + timedelta(days=30)


def test_a_string_that_is_no_invitation_is_refused_without_repeating_it() -> None:
    for text in ("", "secret", "imdsproxy-join-1.c2VjcmV0", "imdsproxy-join-1.\xe4"):
        ran = run_main("fleet", "join", stdin=text)
        assert (ran.status, ran.out) == (64, "")
        assert "c2Vj" not in ran.err


@pytest.mark.parametrize("hours", ["0", "-1", "0.01", "721", "nan"])
def test_the_time_of_an_invitation_is_refused_in_the_unit_in_which_it_was_given(hours: str) -> None:
    words = ("--fleet", "https://127.0.0.1:9", "fleet", "enrol", "host-1", "--valid", hours)
    ran = run_main(*words)
    assert ran.status == 64
    assert f"--valid {hours}: the lifetime must be a minute to 720 hours" in ran.err
    assert "second" not in ran.err


def test_a_ca_is_replaced_in_three_steps_each_of_which_has_its_time(fleet: _Fleet) -> None:
    fleet.init()
    files, now = fleet.files, datetime.now(UTC)
    old, old_operator = files.load_authority(), files.operator.read_bytes()
    assert [fleet("rotate-ca", one).status for one in ("switch", "finish", "end")] == [64, 64, 64]
    begun = fleet("rotate-ca", "begin", "--json")
    assert begun.json["files"] == [str(files.ca_certificate)]
    assert [fleet("rotate-ca", one).status for one in ("begin", "finish")] == [64, 64]
    both = files.load_authority()
    assert (both.certificate, len(both.others)) == (old.certificate, 1)
    assert make_renewed_hub(files, both, now) is None
    with pytest.raises(ConfigInvalid, match="let every host in"):
        refuse_shared_authority(both, files.ca_certificate)

    key = files.next_key.read_bytes()
    assert fleet("rotate-ca", "switch").status == 0
    # Broken off before its end, and done again.
    files.next_key.write_bytes(key)
    files.next_key.chmod(0o600)
    assert fleet("rotate-ca", "switch").status == 0
    assert not files.next_key.exists()
    new = files.load_authority()
    assert (new.certificate, new.others) == (both.others[0], (old.certificate,))
    assert len({one.trusted_digest for one in (old, both, new)}) == 3
    operator = files.operator.read_bytes()
    assert operator != old_operator
    assert operator.endswith(new.trusted)
    pem = make_renewed_hub(files, new, now)
    assert pem is not None
    assert new.has_signed(parse_certificate(pem, "renewed"))
    assert fleet("rotate-ca", "finish").status == 0
    assert files.ca_certificate.read_bytes() == render_certificate(new.certificate)
    assert files.load_authority().others == ()
    assert "PRIVATE" not in begun.out + begun.err


_ASKING = frozenset(
    path
    for path, command in iterate_commands(build_program())
    if any(one.name == "fleet" for one in command.params)
)


def test_commands_on_records_guests_and_the_fleet_itself_ask_one() -> None:
    kinds = ("network", "instance", "policy", "grant")
    wholly = tuple(path for path in EXAMPLES if path.startswith(kinds))
    of_guests = ("get", "explain", "watch", "token revoke", "token rotate")
    of_fleet = ("enrol", "revoke", "status", "hosts", "wait", "accept-restore", "reseal")
    of_issuer = tuple(f"identity {one}" for one in ("check", "keys", "rotate", "show", "tokens"))
    assert {"", *wholly, *of_guests, *of_issuer, *(f"fleet {one}" for one in of_fleet)} == _ASKING


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path not in _ASKING])
def test_a_command_that_asks_no_fleet_refuses_that_one_is_named(path: str) -> None:
    words = shlex.split(EXAMPLES[path].partition("|")[0])[1:]
    ran = run_main("--fleet", "https://127.0.0.1:9", *words)
    assert (ran.status, ran.out) == (64, "")
    assert f"`imdsproxy {path}` works on this host only, but --fleet names a fleet" in ran.err
