"""Rotations of an issuer's keys on a host alone, while a guest takes tokens and a verifier reads the keys."""

import json
import os
import signal
import threading
from dataclasses import dataclass, field
from typing import Any

import jwt

from support.guest import Guest, take_token
from support.identity.requests import request_token
from support.identity.signing import Issuer
from support.lab import run, until, within
from support.world import World


def keys_of(world: World) -> list[dict[str, Any]]:
    """Return the keys, once the signer answers."""
    done = world.daemon.command("identity", "keys", "--json")
    if done.status:
        # The signer is being started again.
        until(
            lambda: world.daemon.command("identity", "keys").status == 0,
            within_s=20,
            what=f"the signer; {(world.daemon.runtime / 'signer.log').read_text()[-3000:]}",
        )
        done = world.daemon.command("identity", "keys", "--json")
    found: list[dict[str, Any]] = json.loads(done.out)["keys"]
    return found


def published(world: World, issuer: Issuer) -> list[dict[str, Any]]:
    """Return the keys as a verifier reads them."""
    curl = ("curl", "-sf", "--cacert", str(issuer.ca_file), issuer.jwks_url)
    found: list[dict[str, Any]] = json.loads(run(*within(world.lab.host), *curl))["keys"]
    return found


def is_good(token: str, keys: list[dict[str, Any]]) -> bool:
    kid = jwt.get_unverified_header(token)["kid"]
    own = [one for one in keys if one["kid"] == kid]
    if not own:
        return False
    jwt.decode(token, jwt.PyJWK(own[0]).key, algorithms=["RS256", "ES256"], audience="vault")
    return True


@dataclass(eq=False)
class Verifying(threading.Thread):
    """A guest that takes new tokens all the time, each verified with the keys of that moment."""

    world: World
    issuer: Issuer
    guest: Guest
    refused: list[str] = field(default_factory=list)
    good: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__()

    def run(self) -> None:
        session = take_token(self.guest)
        while not self.ended.wait(0.2):
            nonce = (f"X-imdsproxy-nonce: n{self.good}",)
            reply = request_token(self.guest, session=session, more=nonce)
            if reply.status == 503:
                continue
            if is_good(reply.text, published(self.world, self.issuer)):
                self.good += 1
            else:
                self.refused.append(reply.text)


def make_due(world: World) -> None:
    """Have the time of the next step come, over an end of the signer."""
    pid = signer_pid(world)
    os.kill(pid, signal.SIGSTOP)
    path = world.daemon.state / "identity" / "keys" / "ring.json"
    ring = json.loads(path.read_text())
    for one in ring["keys"]:
        one["since"] = 0
    path.write_text(json.dumps(ring))
    os.kill(pid, signal.SIGKILL)


def signer_pid(world: World) -> int:
    return int((world.daemon.runtime / "signer.pid").read_text().split()[0])


def restart_signer(world: World) -> None:
    """End the signer if one runs, and wait until another one answers."""
    path = world.daemon.runtime / "signer.pid"
    before = path.read_text().split()[:1]
    if before:
        os.kill(int(before[0]), signal.SIGTERM)

    def answers() -> bool:
        other = path.read_text().split()[:1] not in ([], before)
        return other and world.daemon.command("identity", "keys").status == 0

    until(answers, within_s=20, what="another signer")
