"""One example of each command, for its help, the reference and the manual page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

EXAMPLES: Final[Mapping[str, str]] = {
    "run": "imdsproxy run --config /etc/imdsproxy/imdsproxy.yaml",
    "documents": "imdsproxy documents --config /etc/imdsproxy/imdsproxy.yaml",
    "check": "imdsproxy check",
    "status": "imdsproxy status --check",
    "reload": "imdsproxy reload",
    "stop": "imdsproxy stop --data-plane",
    "render": "imdsproxy render",
    "config show": "imdsproxy config show --origin",
    "config schema": "imdsproxy config schema",
    "config sample": "imdsproxy config sample",
    "config import": "imdsproxy config import --neutron /etc/neutron/metadata_agent.ini",
    "version": "imdsproxy version",
    "completion": "imdsproxy completion bash",
    "network add": "imdsproxy network add red --bridge br-red --subnet 10.0.0.0/24,gateway=10.0.0.1",
    "network set": "imdsproxy network set red --mtu 1400",
    "network list": "imdsproxy network list",
    "network show": "imdsproxy network show red",
    "network remove": "imdsproxy network remove red",
    "instance add": "imdsproxy instance add web -n red --mac 52:54:00:12:34:56 --address 10.0.0.5 --user-data web.yaml",
    "instance set": "imdsproxy instance set web --tag role=web --clear user_data",
    "instance list": "imdsproxy instance list -n red",
    "instance show": "imdsproxy instance show web",
    "instance remove": "imdsproxy instance remove web",
    "instance reopen": "imdsproxy instance reopen web",
    "instance password": "imdsproxy instance password web | base64 -d | openssl pkeyutl -decrypt -inkey ~/.ssh/id_rsa",
    "namespace-proxy": "imdsproxy namespace-proxy --network-id 5c2f0c3e-0d0a-4d5e-9b1f-6a1c5d0a7e11",
    "get": "imdsproxy get /latest/meta-data/ -n red --from 10.0.0.5",
    "explain": "imdsproxy explain web --path /latest/user-data --probe",
    "watch": "imdsproxy watch -n red",
    "token revoke": "imdsproxy token revoke web",
    "token rotate": "imdsproxy token rotate",
    "token report": "imdsproxy token report",
    "doctor": "imdsproxy doctor -n red --from 10.0.0.5",
    "snippet": "imdsproxy snippet web --for libvirt",
}
"""By what calls the command."""
