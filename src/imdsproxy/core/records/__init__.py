"""Records as people write them: mappings in, networks and instances out, and the reverse.

A record is a mapping as YAML or JSON gives it. `parse_records` reads a whole document (`networks:`
and `instances:` lists), `parse_network` and `parse_instance` one record each; all are strict and
tell every problem of a record at once. `render_record` gives the mapping back, fit for JSON.

Keys (`?` may be left out or be null):

    network   id, name?, project?, mtu?, scope? (network or router), mac_check? (on unless false), policy?
              listener: {namespace: NAME, device?: DEV, manage_addresses?: bool}
                      | {interface: DEV} | {bridge: BRIDGE}
              subnets?: [{cidr, gateway?, dns?: [ADDRESS]}]
    instance  id, name, hostname? (made of the name), project?, availability_zone?, instance_type?, policy?
              ports?: [{network, mac?, addresses?: [ADDRESS]}]
              ssh_keys?: ["ssh-ed25519 AAAA… COMMENT" | {name, key}]
              tags?: {NAME: VALUE}
              user_data?: TEXT | BYTES (YAML's !!binary) | {base64: TEXT}
              user_data_file?: PATH          instead of user_data; read by who passes `read_file`
              vendor_data?: TEXT | MAPPING   (a mapping is kept as JSON)
              dialects?: {ec2?: bool, openstack?: bool, nocloud?: bool}    (on unless false)
              upstream?: embedded | nova
              created_at?: UNIX TIME | "2026-11-26T12:00:00Z"
    policy    endpoint?: bool, tokens?, openstack_tokens?, nocloud_tokens?: off | optional | required,
              boot_grace_s?, seal_user_data?: bool, refuse_forwarded?: bool, hop_limit?,
              requests_per_s?, burst?, connections?,
              paths?: {PATH: deny | allow | required | optional}
"""

from __future__ import annotations

from imdsproxy.core.records.document import LISTS, Note, Records, parse_listed, parse_records
from imdsproxy.core.records.fields import Fault, LineOf, Path, Refused, render_path
from imdsproxy.core.records.instance import parse_instance
from imdsproxy.core.records.network import parse_network
from imdsproxy.core.records.payload import MAX_PAYLOAD, ReadFile, Unreadable
from imdsproxy.core.records.render import Json, render_instance, render_network, render_record

__all__ = [
    "Fault",
    "Json",
    "Note",
    "LISTS",
    "LineOf",
    "MAX_PAYLOAD",
    "Path",
    "ReadFile",
    "Records",
    "Refused",
    "Unreadable",
    "parse_instance",
    "parse_listed",
    "parse_network",
    "parse_records",
    "render_instance",
    "render_network",
    "render_path",
    "render_record",
]
