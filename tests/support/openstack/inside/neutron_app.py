"""Neutron's WSGI application with its policy loaded; runs in Neutron's environment, under uWSGI.

By itself Neutron loads it in the thread of the first request. Until that is done, other threads show and allow
nothing, though they answer 200 to lists.
"""

import threading
from typing import Any

from neutron import policy, service
from neutron.wsgi.api import application
from neutron_lib.plugins import directory
from oslo_config import cfg
from oslo_db import exception
from oslo_db.sqlalchemy import enginefacade, exc_filters
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine

__all__ = ["application"]

_WRITES = "writes"
_IMMEDIATE = "immediate"
_thread = threading.local()
_create_session = enginefacade._TransactionFactory._create_session


def _create_marked(factory: Any, mode: Any, bind: Any = None) -> Any:
    session = _create_session(factory, mode, bind)
    if mode is enginefacade._WRITER and bind is None:
        session.bind = session.bind.execution_options(**{_WRITES: True})
    return session


def _begin(connection: Connection) -> None:
    """Have a transaction that is to write take SQLite's lock before it reads.

    One that has read first fails when another has written meanwhile, and Neutron does not try again all that it does:
    of an HA router it keeps a half. In a thread that has the lock it would wait for itself.
    """
    if connection.get_execution_options().get(_WRITES) and not getattr(_thread, "has_lock", False):
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        # By this word oslo.db knows that it need not begin one.
        connection.info["in_transaction"] = _IMMEDIATE
        _thread.has_lock = True


def _end(connection: Connection) -> None:
    if connection.info.get("in_transaction") == _IMMEDIATE:
        _thread.has_lock = False


def _raise_deadlock(error: Exception, *_: object) -> None:
    """SQLite's deadlock is one, as that of other databases: Neutron tries again."""
    raise exception.DBDeadlock(error)


exc_filters.filters("sqlite", exc.OperationalError, ".*database is locked")(_raise_deadlock)
enginefacade._TransactionFactory._create_session = _create_marked
for name, listener in ("begin", _begin), ("commit", _end), ("rollback", _end):
    event.listen(Engine, name, listener)
policy.init()
if not cfg.CONF.transport_url.startswith("fake"):
    # What `neutron-rpc-server` does in a process of its own.
    service.RpcWorker(directory.get_plugins().values(), worker_process_count=0).start()
