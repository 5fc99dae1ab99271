"""The cost of session tokens: one document read with a required token, with optional tokens, and without tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from bench.context import Bench
from bench.daemon import Daemon
from bench.figures import Bar, Row
from bench.guest import Guest
from bench.lab import network_name
from bench.place import BenchError
from bench.records import first_guest
from bench.sides import (
    CONNECTIONS,
    Side,
    compare,
    load_in_turn,
    without_errors,
)

__all__ = ["ROWS", "measure_tokens"]

ROWS: Final = ("tokens-required", "tokens-default")
_PATH: Final = "/latest/meta-data/instance-id"
_URL: Final = f"http://169.254.169.254{_PATH}"
_TTL: Final = "X-aws-ec2-metadata-token-ttl-seconds"
_BAR: Final = Bar("≥ 0.85 x", at_least=0.85)
_OFF: Final = {"tokens": "off", "openstack_tokens": "off", "nocloud_tokens": "off"}
_OK: Final = 200


def measure_tokens(bench: Bench, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure both rows: three networks of one daemon, with tokens off, required, and the default."""
    names = [network_name(number) for number in range(3)]
    bench.lab.grow(len(names))
    off, required, default = names
    said = {off: _OFF, required: {"tokens": "required"}}
    daemon = Daemon(bench.directory / "tokens", {"policy": {"networks": said}})
    try:
        daemon.start()
        daemon.put([bench.network(name) for name in names], [first_guest(name) for name in names])
        daemon.wait_serving(len(names))
        worker = daemon.wait_settled().worker
        without = Side(_URL, worker, network=off)
        with_one = Side(
            _URL,
            worker,
            (f"X-aws-ec2-metadata-token: {_token(bench, required)}",),
            network=required,
        )
        usual = Side(_URL, worker, network=default)
        load_in_turn(bench, [without, with_one, usual], bench.scale.seconds)
        without_errors(without, with_one, usual)
    finally:
        daemon.stop()
    if wanted("tokens-required"):
        yield _row(bench, "tokens-required", "with a token that is required", with_one, without)
    if wanted("tokens-default"):
        yield _row(
            bench, "tokens-default", "without one, where it is optional", usual, without, bar=None
        )


def _token(bench: Bench, name: str) -> str:
    one = Guest(bench.lab, name)
    if one.get(_PATH).status == _OK:
        raise BenchError("a read without a token is answered where one is required")
    one.send("/latest/api/token", method="PUT", header=f"{_TTL}: 21600")
    token = one.receive().body.decode("ascii")
    one.close()
    return token


def _row(
    bench: Bench, key: str, what: str, ours: Side, other: Side, *, bar: Bar | None = _BAR
) -> Row:
    return compare(
        key,
        ours,
        other,
        what=f"{_PATH} read {what}, beside tokens off, {CONNECTIONS} connections",
        how=(
            f"median of {len(ours.rates)} runs of {bench.scale.seconds:g} s in turn, the same HAProxy; "
            "out of its cache, so that nothing else costs much"
        ),
        bar=bar,
    )
