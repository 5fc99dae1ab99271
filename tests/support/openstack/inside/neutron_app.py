"""Neutron's WSGI application with its policy loaded; runs in Neutron's environment, under uWSGI.

By itself Neutron loads it in the thread of the first request. Until that is done, other threads show and allow
nothing, though they answer 200 to lists.
"""

from neutron import policy, service
from neutron.wsgi.api import application
from neutron_lib.plugins import directory
from oslo_config import cfg
from oslo_db import exception
from oslo_db.sqlalchemy import exc_filters
from sqlalchemy import exc

__all__ = ["application"]


def _raise_deadlock(error: Exception, *_: object) -> None:
    """SQLite's deadlock is one, as that of other databases: Neutron tries again."""
    raise exception.DBDeadlock(error)


exc_filters.filters("sqlite", exc.OperationalError, ".*database is locked")(_raise_deadlock)
policy.init()
if not cfg.CONF.transport_url.startswith("fake"):
    # What `neutron-rpc-server` does in a process of its own.
    service.RpcWorker(directory.get_plugins().values(), worker_process_count=0).start()
