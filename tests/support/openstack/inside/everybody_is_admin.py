"""Filter of Nova's API that takes every caller for an administrator, in place of Keystone's."""

from collections.abc import Callable, Iterable
from typing import Any, Final

_ADMIN: Final = {
    "HTTP_X_USER_ID": "admin",
    "HTTP_X_PROJECT_ID": "admin",
    "HTTP_X_ROLES": "admin,member,reader",
    "HTTP_X_IDENTITY_STATUS": "Confirmed",
}

_Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def filter_factory(_conf: Any, **_: str) -> Callable[[_Application], _Application]:
    """Return the filter, as paste wants it."""

    def wrap(application: _Application) -> _Application:
        return lambda environ, start: application({**environ, **_ADMIN}, start)

    return wrap
