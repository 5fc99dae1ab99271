"""Guests as code: exact clients that count every request and every answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from bench.lab import Lab, guest
from bench.place import BenchError

__all__ = ["Answer", "Broken", "Guest", "LoadCount", "SteadyLoad", "parse_head"]

_METADATA: Final = ("169.254.169.254", 80)
_RECEIVE: Final = 65536
_HEAD_END: Final = b"\r\n\r\n"


class Broken(BenchError):
    """No whole answer came; the message has the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read to its last byte; `closes` if the connection cannot be used again."""

    status: int
    body: bytes
    closes: bool


def parse_head(head: bytes) -> tuple[int, int, bool]:
    """Return status, Content-Length and whether the connection closes.

    Raises:
        Broken: These bytes are not the head of an answer.
    """
    first, *lines = head.split(b"\r\n")
    try:
        status = int(first.split(b" ")[1])
    except (IndexError, ValueError):
        raise Broken(f"not an answer: {first[:60]!r}") from None
    length, closes = 0, False
    for line in lines:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        elif name.lower() == b"connection":
            closes = b"close" in value.lower()
    return status, length, closes


class Guest:
    """An address of a network, with one kept connection that is reopened after a close.

    Args:
        lab: The lab with the networks.
        network: The guest's network.
        address: The guest's address.
        timeout_s: Seconds to wait for an answer.
    """

    def __init__(
        self, lab: Lab, network: str, address: str | None = None, *, timeout_s: float = 10
    ) -> None:
        self._lab = lab
        self.network = network
        self.address = guest(0) if address is None else address
        self._timeout_s = timeout_s
        self._socket: socket.socket | None = None

    def get(self, path: str) -> Answer:
        """Send a request and return its answer.

        Raises:
            Broken: The connection was refused, or ended before the answer did.
        """
        self.send(path)
        return self.receive()

    def send(self, path: str, *, method: str = "GET", header: str = "") -> None:
        """Send a request; receive its answer before the next request.

        Args:
            path: The target.
            method: The method.
            header: One more line of the head.

        Raises:
            Broken: The connection was refused, or has ended.
        """
        more = f"{header}\r\n" if header else ""
        request = f"{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{more}\r\n".encode()
        try:
            if self._socket is None:
                self._socket = self._open()
            self._socket.sendall(request)
        except OSError as error:
            self.close()
            raise Broken(str(error)) from error

    def receive(self) -> Answer:
        """Return the answer to the request that was sent.

        Raises:
            Broken: The connection ended before the answer did.
        """
        if self._socket is None:
            raise Broken("nothing was sent")
        try:
            answer = self._read(self._socket)
        except OSError as error:
            self.close()
            raise Broken(str(error)) from error
        except Broken:
            self.close()
            raise
        if answer.closes:
            self.close()
        return answer

    def try_send(self, path: str) -> bool:
        """Send a request; return whether the request was sent."""
        try:
            self.send(path)
        except Broken:
            return False
        return True

    def try_receive(self) -> Answer | None:
        """Return the answer to the request that was sent; `None` instead of `Broken`."""
        try:
            return self.receive()
        except Broken:
            return None

    def try_get(self, path: str) -> Answer | None:
        """Send a request and return its answer; `None` instead of `Broken`."""
        try:
            return self.get(path)
        except Broken:
            return None

    def _open(self) -> socket.socket:
        opened = self._lab.socket(self.network)
        try:
            opened.settimeout(self._timeout_s)
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            opened.bind((self.address, 0))
            opened.connect(_METADATA)
        except OSError:
            opened.close()
            raise
        return opened

    @staticmethod
    def _read(connection: socket.socket) -> Answer:
        data = b""
        while (end := data.find(_HEAD_END)) < 0:
            piece = connection.recv(_RECEIVE)
            if not piece:
                raise Broken(f"closed after {len(data)} bytes")
            data += piece
        status, length, closes = parse_head(data[:end])
        body = data[end + len(_HEAD_END) :]
        while len(body) < length:
            piece = connection.recv(_RECEIVE)
            if not piece:
                raise Broken(f"closed within the body, after {len(body)} of {length} bytes")
            body += piece
        return Answer(status, body, closes)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


@dataclass(slots=True)
class LoadCount:
    """Counts of guests.

    Attributes:
        sent: Requests sent, or not sent because the connection was refused.
        answered: Whole answers with status 200 and the expected body.
        faults: All other outcomes, with the seconds since the load's start; the first hundred.
    """

    sent: int = 0
    answered: int = 0
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def lost(self) -> int:
        """Requests without the right answer."""
        return self.sent - self.answered


class SteadyLoad:
    """Guests that each send request after request, as fast as they are answered, until stopped.

    Args:
        guests: Guests, each with a thread of its own.
        path: The path to read.
        expected: Returns the body that a guest must get; `None` accepts any body.
        fresh_every: Requests after which a guest opens a new connection.
        pause_s: Pause between two requests of a guest.
    """

    def __init__(
        self,
        guests: Sequence[Guest],
        path: str,
        *,
        expected: Callable[[Guest], bytes] | None = None,
        fresh_every: int = 50,
        pause_s: float = 0.0,
    ) -> None:
        self._guests = guests
        self._path = path
        self._expected = expected
        self._fresh_every = fresh_every
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._threads: list[threading.Thread] = []
        self.counts = [LoadCount() for _ in guests]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for one, count in zip(self._guests, self.counts, strict=True):
            thread = threading.Thread(target=self._work, args=(one, count), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> LoadCount:
        """End the load after the requests in progress; return the sum of all counts."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        for one in self._guests:
            one.close()
        return LoadCount(
            sent=sum(one.sent for one in self.counts),
            answered=sum(one.answered for one in self.counts),
            faults=[fault for one in self.counts for fault in one.faults],
            slowest_s=max((one.slowest_s for one in self.counts), default=0.0),
        )

    def _work(self, one: Guest, count: LoadCount) -> None:
        expected = None if self._expected is None else self._expected(one)
        while not self._stop.is_set():
            began = time.monotonic()
            count.sent += 1
            fault = _ask(one, self._path, expected)
            count.slowest_s = max(count.slowest_s, time.monotonic() - began)
            if fault is None:
                count.answered += 1
            elif len(count.faults) < 100:  # noqa: PLR2004 - enough to see why
                count.faults.append(f"{began - self._began:.3f} s: {one.network} {fault}")
            if count.sent % self._fresh_every == 0:
                one.close()
            if self._pause_s:
                self._stop.wait(self._pause_s)


def _ask(one: Guest, path: str, expected: bytes | None) -> str | None:
    try:
        answer = one.get(path)
    except Broken as broken:
        return str(broken)
    if answer.status != 200:  # noqa: PLR2004 - HTTP's OK
        return f"status {answer.status}"
    if expected is not None and answer.body != expected:
        return f"another body: {answer.body[:60]!r}"
    return None


def measure_latency(
    one: Guest, path: str, seconds: float, *, pause_s: float = 0.001
) -> list[float]:
    """Return the seconds of each answer, with one request after the other and a pause between."""
    samples = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        one.get(path)
        samples.append(time.perf_counter() - began)
        time.sleep(pause_s)
    with contextlib.suppress(OSError):
        one.close()
    return samples
