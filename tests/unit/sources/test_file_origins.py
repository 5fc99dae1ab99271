"""The origin of a port in a network that no source has: file, line and field."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from imdsproxy.core.inventory import Inventory
from imdsproxy.core.model import InstanceId
from imdsproxy.core.observation import Observation
from imdsproxy.sources.api import Origin
from imdsproxy.sources.file.source import FileSource

_TEXT = """\
instances:
  - id: db
    name: db
    ports: []
  - id: web
    name: web
    ports:
      - network: nowhere
        addresses:
          - 10.0.0.5
      - network: beyond
"""


async def test_a_port_of_an_unknown_network_is_reported_with_file_line_and_field(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(_TEXT)
    source = FileSource(tmp_path)
    assert source.origin_of_port(InstanceId("web"), 0) is None
    inventory = Inventory(["file"])
    seen = asyncio.Event()

    def publish(observation: Observation) -> None:
        inventory.observe(observation)
        seen.set()

    task = asyncio.create_task(source.run(publish))
    try:
        async with asyncio.timeout(30):
            await seen.wait()
        assert [(one.source, one.number, one.network) for one in inventory.stranded()] == [
            ("file", 1, "beyond"),
            ("file", 0, "nowhere"),
        ]
        web = InstanceId("web")
        assert source.origin_of_port(web, 0) == Origin(
            "instances[1].ports[0].network", str(path), 10
        )
        assert source.origin_of_port(web, 1) == Origin(
            "instances[1].ports[1].network", str(path), 5
        )
        assert source.origin_of_port(web, 2) is None
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
