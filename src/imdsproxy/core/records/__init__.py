"""Records as people write them: mappings in, networks and instances out, and the reverse.

A record is a mapping as YAML or JSON gives it. `parse_records` reads a whole document (`networks:`
and `instances:` lists), `parse_network` and `parse_instance` one record each; all are strict and
report every problem of a record at once. `render_record` gives the mapping back, fit for JSON.

What keys there are, and what each takes, is in the tables `NETWORK`, `INSTANCE` and `POLICY`.
"""

from __future__ import annotations

from imdsproxy.core.records.document import (
    LISTS,
    Note,
    Records,
    parse_instance,
    parse_listed,
    parse_network,
    parse_records,
    render_instance,
    render_network,
    render_record,
)
from imdsproxy.core.records.fields import (
    MAX_PAYLOAD,
    Fault,
    LineOf,
    Path,
    ReadFile,
    Refused,
    Unreadable,
    render_path,
)
from imdsproxy.core.records.instance import INSTANCE
from imdsproxy.core.records.network import NETWORK
from imdsproxy.core.records.policy import POLICY
from imdsproxy.core.records.schema import Json
