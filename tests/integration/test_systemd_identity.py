"""The units of identity tokens under a real systemd: the operator's key as an encrypted credential."""

import json
from collections.abc import Iterator
from typing import Final

import jwt
import pytest

from support.guest import Guest
from support.identity.requests import wait_token
from support.lab import until
from support.systemd_daemon import CONTROLLER, IDENTITY, PROGRAM, SIGNER, UnitDaemon, installed

pytestmark = [pytest.mark.root, pytest.mark.slow]

_CREDENTIAL: Final = f"/run/credentials/{SIGNER}/identity"
_SEALED: Final = "/etc/credstore.encrypted/identity"
_DROP_IN: Final = f"/etc/systemd/system/{SIGNER}.d/key.conf"
_SETTINGS: Final = {
    "identity": {
        "enabled": True,
        "issuer": "https://id.cloud.example",
        "key_file": _CREDENTIAL,
    },
    "policy": {"host": {"audiences": ["vault"]}},
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UnitDaemon]:
    """Started, with the credential of the first key."""
    with installed(tmp_path_factory.mktemp("machine")) as daemon:
        daemon.plug_in()
        daemon.configure(json.dumps(_SETTINGS))
        daemon.machine.write(_DROP_IN, "[Service]\nLoadCredentialEncrypted=identity\n")
        daemon.machine.run("systemctl", "daemon-reload")
        _seal(daemon, _new_key(daemon, *_RSA))
        daemon.start()
        yield daemon


def _seal(daemon: UnitDaemon, text: str) -> None:
    """Put a text into the credential."""
    words = ("systemd-creds", "encrypt", "--with-key=host", "--name=identity", "-", _SEALED)
    daemon.machine.run("mkdir", "-p", "/etc/credstore.encrypted")
    daemon.machine.run(*words, text=text)


def _new_key(daemon: UnitDaemon, *option: str) -> str:
    words = ("openssl", "genpkey", "-quiet", "-algorithm", *option)
    return daemon.machine.run(*words)


_RSA: Final = ("RSA", "-pkeyopt", "rsa_keygen_bits:2048")
_P256: Final = ("EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def _keys(daemon: UnitDaemon) -> list[str]:
    """Return the ids of the issuer's keys; none while the signer is being started."""
    status, out = daemon.machine.attempt(PROGRAM, "identity", "keys", "--json")
    return [one["id"] for one in json.loads(out)["keys"]] if status == 0 else []


def _signing(guest: Guest) -> str:
    return str(jwt.get_unverified_header(wait_token(guest))["kid"])


def test_a_key_that_systemd_decrypts_signs_and_lies_nowhere_in_the_clear(
    daemon: UnitDaemon,
) -> None:
    guest, machine = daemon.guests[0], daemon.machine
    # The test before may have changed the key.
    until(lambda: _keys(daemon) == [_signing(guest)], within_s=20, what="a token of the key")
    pid = str(machine.main_pid(SIGNER))
    owner = machine.run("id", "-u", "imdsproxy-signer")
    assert f"Uid:\t{owner}\t{owner}" in machine.run("cat", f"/proc/{pid}/status")
    keys = "grep -rlsF 'PRIVATE KEY' /var/lib/imdsproxy /etc/imdsproxy /etc/credstore.encrypted"
    assert machine.attempt("sh", "-c", keys)[1] == ""
    assert machine.run("stat", "-c", "%a %u", _CREDENTIAL) == "400 0"
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    assert machine.attempt(*nobody, "cat", _CREDENTIAL)[0] != 0
    assert "PRIVATE" not in machine.journal()
    until(lambda: daemon.status()["readiness"]["ready"], within_s=20, what="readiness")


def test_another_credential_signs_after_a_restart_of_its_unit_alone(daemon: UnitDaemon) -> None:
    guest, machine = daemon.guests[0], daemon.machine
    before = _signing(guest)
    controller = machine.main_pid(CONTROLLER)
    _seal(daemon, _new_key(daemon, *_P256))
    machine.run("systemctl", "restart", SIGNER)
    until(
        lambda: before not in _keys(daemon) == [_signing(guest)],
        within_s=20,
        what="a token of the other key",
    )
    assert machine.main_pid(CONTROLLER) == controller


def test_a_credential_that_holds_no_key_is_named_in_the_journal_and_its_mending_suffices(
    daemon: UnitDaemon,
) -> None:
    machine = daemon.machine
    _seal(daemon, "no key\n")
    machine.attempt("systemctl", "restart", SIGNER)
    until(lambda: not daemon.status()["readiness"]["ready"], within_s=20, what="the refusal")
    told = machine.journal(SIGNER)
    assert "holds no private key in PEM" in told
    _seal(daemon, _new_key(daemon, *_RSA))
    until(lambda: daemon.status()["readiness"]["ready"], within_s=40, what="readiness")
    assert _signing(daemon.guests[0])
    assert machine.unit(IDENTITY, "ActiveState") == "active"
