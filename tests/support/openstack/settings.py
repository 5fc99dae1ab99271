"""The configuration files of the lab's Nova, Neutron and metadata agent. Pure.

Databases are named relative to the directory in which the servers run: what was made in one directory works in
another, also the cells' connections, which Nova keeps in its database.
"""

from pathlib import Path

VENDOR_DATA = '{"lab": {"vendor": "static vendor data"}}'


def render_neutron(*, paste: Path, broker: str = "") -> str:
    """neutron.conf: every caller is admin, and ports bind although no Open vSwitch agent runs.

    Args:
        broker: A message broker's URL; without one it is the REST API alone.
    """
    return f"""\
[DEFAULT]
host = lab
auth_strategy = noauth
core_plugin = ml2
service_plugins = router
transport_url = {broker or "fake://"}
api_paste_config = {paste}
state_path = .
dns_domain = lab.example.
notify_nova_on_port_status_changes = false
notify_nova_on_port_data_changes = false
dhcp_agent_notification = {bool(broker)}
# Agents get what a test gives them.
network_auto_schedule = false
router_auto_schedule = false
# The one Open vSwitch agent is a row whose heartbeat lies in the future: it stays alive, so that ports bind.
agent_down_time = 2147483
use_stderr = true
[database]
# So long is the longest wait for the lock of one who writes, in seconds.
connection = sqlite:///db/neutron.sqlite?timeout=60
sqlite_synchronous = false
[oslo_concurrency]
lock_path = lock
[oslo_messaging_notifications]
driver = noop
[quotas]
default_quota = -1
quota_network = -1
quota_subnet = -1
quota_port = -1
quota_router = -1
quota_security_group = -1
quota_security_group_rule = -1
[ml2]
type_drivers = local,flat,vlan,vxlan
tenant_network_types = vxlan
mechanism_drivers = openvswitch
extension_drivers = port_security,dns
[ml2_type_vxlan]
vni_ranges = 1:1000
[securitygroup]
enable_security_group = true
"""


def render_nova(*, neutron_port: int, secret: str) -> str:
    """nova.conf of one metadata API.

    Args:
        neutron_port: Where Neutron listens on loopback; Nova asks it for security groups on every request.
    """
    return f"""\
[DEFAULT]
host = lab
my_ip = 127.0.0.1
transport_url = fake://
state_path = .
use_stderr = true
[api]
# Once it is over Nova asks Neutron for security groups, and answers 500 while that is stopped.
metadata_cache_expiration = 600
dhcp_domain = novalocal
vendordata_providers = StaticJSON
vendordata_jsonfile_path = etc/vendor_data.json
[api_database]
connection = sqlite:///db/nova_api.sqlite
sqlite_synchronous = false
[database]
connection = sqlite:///db/nova_cell1.sqlite
sqlite_synchronous = false
[neutron]
auth_type = none
endpoint_override = http://127.0.0.1:{neutron_port}
service_metadata_proxy = true
metadata_proxy_shared_secret = {secret}
[oslo_concurrency]
lock_path = lock
[oslo_messaging_notifications]
driver = noop
"""


COMPUTE_PASTE = """\
[composite:osapi_compute]
use = call:nova.api.openstack.urlmap:urlmap_factory
/v2.1/+: compute
[composite:compute]
use = call:nova.api.auth:pipeline_factory_v21
keystone = everybody_is_admin keystonecontext osapi_compute_app_v21
[filter:everybody_is_admin]
paste.filter_factory = everybody_is_admin:filter_factory
[filter:keystonecontext]
paste.filter_factory = nova.api.auth:NovaKeystoneContext.factory
[app:osapi_compute_app_v21]
paste.app_factory = nova.api.openstack.compute:APIRouterV21.factory
"""


def render_agent(*, socket: Path, nova_port: int, secret: str) -> str:
    """metadata_agent.ini of Neutron's own agent."""
    return f"""\
[DEFAULT]
metadata_proxy_socket = {socket}
nova_metadata_host = 127.0.0.1
nova_metadata_port = {nova_port}
metadata_proxy_shared_secret = {secret}
metadata_workers = 2
# It has ML2's own end in its process.
transport_url = fake://
[AGENT]
report_interval = 0
"""


def render_clouds(*, neutron_url: str) -> str:
    """clouds.yaml for openstacksdk, cloud `lab`.

    The override is the root: with `/v2.0` openstacksdk's version discovery finds nothing.
    """
    return f"""\
clouds:
  lab:
    auth_type: none
    network_endpoint_override: {neutron_url}
"""
