"""Genuine Keystone of a site whose page of Keystone is followed, and the commands of the page that change servers."""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from support.identity.keystone import (
    MODULES,
    Keystone,
    Place,
    log_in,
    new_directory,
    program,
    running,
)
from support.identity.site import ADDRESS, OTHER_PROJECT, PROJECT, Site
from support.openstack.servers import ends_with_us

_SETTINGS: Final = "/etc/keystone/keystone.conf.d"
_ENABLED: Final = "/etc/apache2/conf-enabled"

# The machine has Apache's program alone, without the commands of Debian's package, and no systemd.
_PROGRAMS: Final = {
    "apt-get": '[ "$*" = "install --yes libapache2-mod-auth-openidc" ]',
    "a2enmod": f"""
        [ "$*" = auth_openidc ]
        mkdir -p {_ENABLED}
        echo LoadModule auth_openidc_module {MODULES}/mod_auth_openidc.so >{_ENABLED}/0-module.conf
        """,
    "a2enconf": f"cp /etc/apache2/conf-available/$1.conf {_ENABLED}/",
    "a2disconf": f"rm {_ENABLED}/$1.conf",
}
# Both servers write their files when they have read their settings.
_SYSTEMCTL: Final = """
case "$*" in
    "restart apache2 keystone") ;;
    *) exit 1 ;;
esac
apache=$(cat {directory}/apache.pid)
rm {directory}/started
kill $apache
touch {directory}/application.py
while kill -0 $apache 2>/dev/null; do sleep 0.1; done
until [ -e {directory}/apache.pid ] && [ -e {directory}/started ]; do sleep 0.1; done
until curl --silent --fail --output answer https://keystone.example:5000/v3; do sleep 0.1; done
"""
# Apache ends in SIGSEGV if a mere reload brings it the module of OpenID Connect.
_AGAIN: Final = """
trap 'kill $child; wait $child; exit' TERM
while :; do
    "$@" &
    child=$!
    wait $child || :
done
"""


@contextlib.contextmanager
def open_keystone_of(site: Site) -> Iterator[Keystone]:
    """Run Keystone as `keystone.example` of a site, with the site's projects, and without trust in an issuer."""
    host = site.world.lab.host
    with new_directory() as directory, contextlib.ExitStack() as stack:
        own = site.authority.issue("keystone", names=["DNS:keystone.example"])
        shutil.copy(own.certificate, directory / "keystone.crt")
        shutil.copy(own.key, directory / "keystone.key")
        _have_projects(directory / "keystone.sqlite")
        for path in (_SETTINGS, "/etc/apache2/conf-available"):
            site.write(f"{path}/.placeholder", "")
        place = Place(directory, host, site.within(host), "https://keystone.example:5000")
        keystone = place.keystone_server("", "--config-dir", _SETTINGS)
        apache = place.apache_server(ADDRESS, f"IncludeOptional {_ENABLED}/*.conf")
        apache.argv = [*ends_with_us(), "sh", "-c", _AGAIN, "sh", *apache.argv]
        stack.enter_context(running(keystone, apache))
        installed = {
            **_PROGRAMS,
            "systemctl": _SYSTEMCTL.format(directory=directory),
            **{name: f'exec {program(name)} "$@"' for name in ("openstack", "python3")},
        }
        for name, script in installed.items():
            site.install(name, f"#!/bin/sh\nset -eu\n{script}\n")
            stack.callback((site.programs / name).unlink)
        made = Keystone(host, f"{place.url}/v3", site.authority.ca_file, log_in(host))
        _have_catalog(made)
        yield made


def _have_projects(database: Path) -> None:
    """Write the site's projects, whose ids Keystone's API would choose by itself."""
    row = "INSERT INTO project (id, name, extra, enabled, domain_id, parent_id, is_domain)"
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for name, project in (("own", PROJECT), ("other", OTHER_PROJECT)):
            values = (project, name, "{}", 1, "default", "default", 0)
            connection.execute(f"{row} VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _have_catalog(keystone: Keystone) -> None:
    """Have Keystone's own URL in its catalogue, where clients look for it."""
    made = keystone.send("POST", "services", service={"type": "identity", "name": "keystone"})
    own = {"service_id": made["service"]["id"], "interface": "public", "url": keystone.url}
    keystone.send("POST", "endpoints", endpoint=own)
