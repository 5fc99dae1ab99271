"""Client of Neutron's REST API. Only this module imports keystoneauth and openstacksdk.

`imdsproxy[neutron]` installs them. The first query imports them in its thread: 12 MB and 80 ms without Keystone, 27 MB
and 140 ms with Keystone (openstacksdk reads `clouds.yaml` and finds Neutron by Keystone's catalogue). Hosts without
this source do not load them. Ports are read as JSON: openstacksdk's resource objects add nothing.
"""

import asyncio
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http import HTTPStatus
from threading import Lock
from typing import Any, Final, TypeAlias

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import SourceUnavailable, optional_library
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery, parse_ports, render_query

_VERSION: Final = "/v2.0"
_CHUNK: Final = 65_536
_MAX_ANSWER: Final = 32 * 1024 * 1024
"""Maximum bytes of one answer: a page of 10,000 ports with three addresses each has 6 MiB."""

_SHOWN: Final = 300
_PLACE: Final = re.compile(r"https?://[^/\s?]+")
_QUERY: Final = re.compile(r"\?\S+")

_ELSEWHERE: Final = (
    "say where Neutron really is: `sources.neutron.endpoint`, or the cloud's `network_endpoint_override`; no token is "
    "sent after a redirection"
)
_HINTS: Final = {
    400: "see Neutron's own words",
    401: "correct the account's name or password in the clouds.yaml",
    403: "give the account the role `admin`, or a policy that lets it read every project's ports",
    **dict.fromkeys((301, 302, 303, 307, 308), _ELSEWHERE),
    404: "correct where Neutron is: `sources.neutron.endpoint`, or the cloud's `network_endpoint_override`",
    414: "Neutron's web server takes short requests only: raise its limit (uWSGI: buffer-size)",
    429: "Neutron limits our requests: raise its limit, or sources.neutron.refresh_s",
}


_Adapter: TypeAlias = Any
"""A `keystoneauth1.adapter.Adapter`; its type is available only if keystoneauth is installed."""


class QueryTimedOut(SourceUnavailable):
    pass


def import_openstack() -> AbstractContextManager[None]:
    """Return a context for importing OpenStack's libraries.

    Raises:
        LibraryMissing: The libraries are not installed, or not for this Python.
    """
    return optional_library(
        "openstacksdk", "apt install python3-openstacksdk, or pip install 'imdsproxy[neutron]'"
    )


def require_library() -> None:
    """Check that the libraries are installed, without a connection. Raises `LibraryMissing`: As `import_openstack`."""
    with import_openstack():
        import keystoneauth1  # noqa: F401 - a part of openstacksdk that loads in no time


def _connect(settings: NeutronSourceSettings) -> _Adapter:
    """Make an adapter for a Neutron without tokens, or for a cloud in a `clouds.yaml`.

    Only that file and a `secure.yaml` beside it are read; environment and working directory are ignored.

    Raises:
        LibraryMissing: As `import_openstack`.
        SourceUnavailable: The file or the cloud cannot be used.
    """
    with import_openstack():
        from keystoneauth1.adapter import Adapter

        if settings.cloud is None:
            from keystoneauth1.noauth import NoAuth
            from keystoneauth1.session import Session

            auth = NoAuth(endpoint=settings.endpoint)
            return Adapter(Session(auth=auth, timeout=settings.timeout_s, app_name="imdsproxy"))
        from keystoneauth1.exceptions import ClientException
        from openstack.config import OpenStackConfig
        from openstack.exceptions import SDKException
        from yaml import YAMLError

    clouds_file = settings.clouds_path
    try:
        # openstacksdk treats a file that it cannot read as missing.
        clouds_file.read_bytes()
        cloud = OpenStackConfig(
            config_files=[str(clouds_file)],
            secure_files=[str(clouds_file.with_name("secure.yaml"))],
            vendor_files=[],
            load_envvars=False,
            app_name="imdsproxy",
        ).get_one(cloud=settings.cloud, api_timeout=settings.timeout_s)
        return Adapter(
            cloud.get_session(),
            service_type="network",
            interface=cloud.get_interface("network"),
            region_name=cloud.get_region_name("network"),
            endpoint_override=cloud.get_endpoint("network"),
        )
    except (SDKException, ClientException, YAMLError, OSError, ValueError, TypeError) as error:
        # YAMLError: openstacksdk 4.4 does not catch it.
        raise SourceUnavailable(
            f"the cloud {settings.cloud} of {clouds_file} cannot be used: {_words(error)}",
            hint="correct sources.neutron.cloud, or the file",
        ) from error


class NeutronClient:
    """Client for Neutron's list of ports. Queries run in a small thread pool; the first one connects."""

    def __init__(self, settings: NeutronSourceSettings) -> None:
        self._settings = settings
        self._timeout_s = settings.timeout_s
        self._pool = ThreadPoolExecutor(settings.max_queries, "imdsproxy-neutron")
        self._connecting = Lock()
        self._session: _Adapter = None

    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        """Return the ports, in Neutron's order. If Neutron does not know a filter, it returns additional ports.

        Raises:
            QueryTimedOut: The answer takes too long.
            SourceUnavailable: Neutron cannot be reached, refuses, or sends an answer that is not valid.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._pool, self._ports, query)
        except TimeoutError as error:
            raise self._too_long() from error

    async def close(self) -> None:
        """Cancel queries without waiting: each thread ends with its query, at the latest at the query's timeout."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        ends = time.monotonic() + self._timeout_s
        with self._connecting:
            if self._session is None:
                self._session = _connect(self._settings)
            session = self._session
        body = self._get(session, f"{_VERSION}/ports?{render_query(query)}", ends)
        try:
            return parse_ports(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise SourceUnavailable(
                f"Neutron's answer cannot be understood: {_words(error)}",
                hint="look at what answers there: it may be another service",
            ) from error

    def _get(self, session: _Adapter, path: str, ends: float) -> bytes:
        from keystoneauth1 import exceptions
        from urllib3 import exceptions as body_exceptions

        try:
            root = session.get_endpoint()
            if root is None:
                raise _unfindable("no endpoint")
            answer = session.get(
                root.rstrip("/").removesuffix(_VERSION) + path,
                # Only `queries` decides when to retry.
                connect_retries=0,
                status_code_retries=0,
                # A redirection would send our token to the other host.
                redirect=False,
                raise_exc=False,
                log=False,
                stream=True,
                timeout=self._timeout_s,
            )
            with answer:
                body = self._read(answer, ends)
        except (exceptions.ConnectTimeout, body_exceptions.TimeoutError) as error:
            raise self._too_long() from error
        except exceptions.CatalogException as error:
            raise _unfindable(error) from error
        except exceptions.Unauthorized as error:
            raise _refused(401, _words(error)) from error
        except (
            exceptions.ClientException,
            body_exceptions.HTTPError,
            OSError,
            ValueError,
        ) as error:
            raise SourceUnavailable(
                f"Neutron cannot be asked: {_cause(error)}",
                hint="start Neutron, or correct where it is: sources.neutron",
            ) from error
        if answer.status_code != HTTPStatus.OK:
            there = answer.headers.get("Location")
            text = body.decode("utf-8", "backslashreplace") if there is None else f"go to {there}"
            raise _refused(answer.status_code, text)
        return body

    def _read(self, answer: Any, ends: float) -> bytes:
        parts: list[bytes] = []
        size = 0
        # Read what has arrived, so that the deadline also stops an answer of a byte per second.
        while part := answer.raw.read1(_CHUNK, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > _MAX_ANSWER:
                raise SourceUnavailable(
                    f"Neutron's answer is longer than {_MAX_ANSWER >> 20} MiB",
                    hint="it may not know our filters; for the list, lower sources.neutron.page_size",
                )
            if time.monotonic() > ends:
                raise self._too_long()
        return b"".join(parts)

    def _too_long(self) -> QueryTimedOut:
        return QueryTimedOut(
            f"Neutron did not answer within {self._timeout_s:g} s",
            hint="look at Neutron's load and database, or raise sources.neutron.timeout_s",
        )


def _unfindable(why: object) -> SourceUnavailable:
    return SourceUnavailable(
        f"Keystone's catalogue has no Neutron for us: {_words(why)}",
        hint="correct the cloud's region_name or interface, or give it a network_endpoint_override",
    )


def _refused(status: int, text: str) -> SourceUnavailable:
    detail = f": {_words(text)}" if text else ""
    return SourceUnavailable(
        f"Neutron answers {status}{detail}", hint=_HINTS.get(status, "look at Neutron's log")
    )


def _cause(error: BaseException) -> str:
    """Return the root cause and the server, without our query, which differs each time."""
    place = _PLACE.search(str(error))
    bottom: BaseException | None = error
    system = ""
    while bottom is not None:
        if isinstance(bottom, OSError) and bottom.strerror:
            system = bottom.strerror
        bottom = bottom.__cause__ or bottom.__context__
    if not system:
        return _QUERY.sub("?…", _words(error))
    return system if place is None else f"{place[0]}: {system}"


def _words(error: object) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    # The text is untrusted and is shown on terminals.
    shown = (one if one.isprintable() else ascii(one)[1:-1] for one in words[:_SHOWN])
    return "".join(shown)[:_SHOWN]
