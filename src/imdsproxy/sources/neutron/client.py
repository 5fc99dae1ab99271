"""Clients of OpenStack's REST APIs. Only this module imports keystoneauth and openstacksdk.

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
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

from imdsproxy.config.sources import NeutronSourceSettings
from imdsproxy.errors import SourceUnavailable, optional_library
from imdsproxy.sources.neutron.ports import NeutronPort, PortQuery, parse_ports, render_query

_CHUNK: Final = 65_536
_MAX_ANSWER: Final = 32 * 1024 * 1024
"""Maximum bytes of one answer: a page of 10,000 ports with three addresses each has 6 MiB."""

_SHOWN: Final = 300
_PLACE: Final = re.compile(r"https?://[^/\s?]+")
_QUERY: Final = re.compile(r"\?\S+")

_ELSEWHERE: Final = "say where {name} really is: {place}; no token is sent after a redirection"
_HINTS: Final = {
    400: "see {name}'s own words",
    401: "correct the account's name or password in the clouds.yaml",
    403: "give the account the role `admin`, or a policy that lets it read {reads}",
    **dict.fromkeys((301, 302, 303, 307, 308), _ELSEWHERE),
    404: "correct where {name} is: {place}",
    414: "{name}'s web server takes short requests only: raise its limit (uWSGI: buffer-size)",
    429: "{name} limits our requests: raise its limit, or {section}.refresh_s",
}


@dataclass(frozen=True, slots=True)
class Service:
    """Service of OpenStack that is asked.

    Attributes:
        name: Name in messages.
        type: Type in Keystone's catalogue.
        version: Path of the API below the service's root.
        section: Section of the settings with `cloud`.
        endpoint_key: Key of the section with the URL of a service that accepts requests without a token.
        reads: Right that the account needs, in words.
    """

    name: str
    type: str
    version: str
    section: str
    endpoint_key: str
    reads: str

    @property
    def place(self) -> str:
        """Settings that say where the service is."""
        override = f"{self.type}_endpoint_override"
        return f"`{self.section}.{self.endpoint_key}`, or the cloud's `{override}`"

    def hint(self, status: int) -> str:
        """Return the operator's remedy for a refusal with this status."""
        words = _HINTS.get(status, "look at {name}'s log")
        return words.format(
            name=self.name, section=self.section, reads=self.reads, place=self.place
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a service: a cloud of a clouds.yaml, or the URL of a service without tokens."""

    cloud: str | None
    clouds_file: Path
    endpoint: str | None
    timeout_s: float


NEUTRON: Final = Service(
    "Neutron", "network", "/v2.0", "sources.neutron", "endpoint", "every project's ports"
)

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


def _connect(service: Service, place: Place) -> _Adapter:
    """Make an adapter for a service without tokens, or for a cloud in a `clouds.yaml`.

    Only that file and a `secure.yaml` beside it are read; environment and working directory are ignored.

    Raises:
        LibraryMissing: As `import_openstack`.
        SourceUnavailable: The file or the cloud cannot be used.
    """
    with import_openstack():
        from keystoneauth1.adapter import Adapter

        if place.cloud is None:
            from keystoneauth1.noauth import NoAuth
            from keystoneauth1.session import Session

            auth = NoAuth(endpoint=place.endpoint)
            return Adapter(Session(auth=auth, timeout=place.timeout_s, app_name="imdsproxy"))
        from keystoneauth1.exceptions import ClientException
        from openstack.config import OpenStackConfig
        from openstack.exceptions import SDKException
        from yaml import YAMLError

    clouds_file = place.clouds_file
    try:
        # openstacksdk treats a file that it cannot read as missing.
        clouds_file.read_bytes()
        cloud = OpenStackConfig(
            config_files=[str(clouds_file)],
            secure_files=[str(clouds_file.with_name("secure.yaml"))],
            vendor_files=[],
            load_envvars=False,
            app_name="imdsproxy",
        ).get_one(cloud=place.cloud, api_timeout=place.timeout_s)
        return Adapter(
            cloud.get_session(),
            service_type=service.type,
            interface=cloud.get_interface(service.type),
            region_name=cloud.get_region_name(service.type),
            endpoint_override=cloud.get_endpoint(service.type),
        )
    except (SDKException, ClientException, YAMLError, OSError, ValueError, TypeError) as error:
        # YAMLError: openstacksdk 4.4 does not catch it.
        raise SourceUnavailable(
            f"the cloud {place.cloud} of {clouds_file} cannot be used: {_words(error)}",
            hint=f"correct {service.section}.cloud, or the file",
        ) from error


class RestClient:
    """Client for reads of one service. Queries run in a small thread pool; the first one connects."""

    def __init__(self, service: Service, place: Place, threads: int) -> None:
        self._service = service
        self._place = place
        self._timeout_s = place.timeout_s
        self._pool = ThreadPoolExecutor(threads, f"imdsproxy-{service.name.lower()}")
        self._connecting = Lock()
        self._session: _Adapter = None

    async def get(self, path: str) -> Any:
        """Return the decoded answer to a GET of a path with its query, below the service's version.

        Raises:
            QueryTimedOut: The answer takes too long.
            SourceUnavailable: The service cannot be reached, refuses, or sends no JSON.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                return await loop.run_in_executor(self._pool, self._read_json, path)
        except TimeoutError as error:
            raise self._too_long() from error

    async def close(self) -> None:
        """Cancel queries without waiting: each thread ends with its query, at the latest at the query's timeout."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def misunderstood(self, error: object) -> SourceUnavailable:
        """Return the error of an answer whose form is wrong."""
        return SourceUnavailable(
            f"{self._service.name}'s answer cannot be understood: {_words(error)}",
            hint="look at what answers there: it may be another service",
        )

    def _read_json(self, path: str) -> Any:
        ends = time.monotonic() + self._timeout_s
        with self._connecting:
            if self._session is None:
                self._session = _connect(self._service, self._place)
            session = self._session
        body = self._get(session, f"{self._service.version}{path}", ends)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise self.misunderstood(error) from error

    def _get(self, session: _Adapter, path: str, ends: float) -> bytes:
        from keystoneauth1 import exceptions
        from urllib3 import exceptions as body_exceptions

        try:
            root = session.get_endpoint()
            if root is None:
                raise self._unfindable("no endpoint")
            answer = session.get(
                _root_of(root, self._service.version) + path,
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
            raise self._unfindable(error) from error
        except exceptions.Unauthorized as error:
            raise self._refused(401, _words(error)) from error
        except (
            exceptions.ClientException,
            body_exceptions.HTTPError,
            OSError,
            ValueError,
        ) as error:
            raise SourceUnavailable(
                f"{self._service.name} cannot be asked: {_cause(error)}",
                hint=f"start {self._service.name}, or correct where it is: {self._service.section}",
            ) from error
        if answer.status_code != HTTPStatus.OK:
            there = answer.headers.get("Location")
            text = body.decode("utf-8", "backslashreplace") if there is None else f"go to {there}"
            raise self._refused(answer.status_code, text)
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
                    f"{self._service.name}'s answer is longer than {_MAX_ANSWER >> 20} MiB",
                    hint=f"it may not know our filters; for the list, lower {self._service.section}.page_size",
                )
            if time.monotonic() > ends:
                raise self._too_long()
        return b"".join(parts)

    def _too_long(self) -> QueryTimedOut:
        name, section = self._service.name, self._service.section
        return QueryTimedOut(
            f"{name} did not answer within {self._timeout_s:g} s",
            hint=f"look at {name}'s load and database, or raise {section}.timeout_s",
        )

    def _unfindable(self, why: object) -> SourceUnavailable:
        override = f"{self._service.type}_endpoint_override"
        return SourceUnavailable(
            f"Keystone's catalogue has no {self._service.name} for us: {_words(why)}",
            hint=f"correct the cloud's region_name or interface, or give it a {override}",
        )

    def _refused(self, status: int, text: str) -> SourceUnavailable:
        detail = f": {_words(text)}" if text else ""
        return SourceUnavailable(
            f"{self._service.name} answers {status}{detail}", hint=self._service.hint(status)
        )


class NeutronClient(RestClient):
    """Client for Neutron's list of ports."""

    def __init__(self, settings: NeutronSourceSettings, service: Service = NEUTRON) -> None:
        place = Place(settings.cloud, settings.clouds_path, settings.endpoint, settings.timeout_s)
        super().__init__(service, place, settings.max_queries)

    async def ports(self, query: PortQuery) -> tuple[NeutronPort, ...]:
        """Return the ports, in Neutron's order. If Neutron does not know a filter, it returns additional ports.

        Raises:
            QueryTimedOut: The answer takes too long.
            SourceUnavailable: Neutron cannot be reached, refuses, or sends an answer that is not valid.
        """
        answer = await self.get(f"/ports?{render_query(query)}")
        try:
            return parse_ports(answer)
        except (ValueError, RecursionError) as error:
            raise self.misunderstood(error) from error


def _root_of(endpoint: str, version: str) -> str:
    """Return an endpoint without the version, which may be followed by a project's id, as Nova's once was."""
    return re.sub(rf"{re.escape(version)}(/[0-9a-f-]+)?$", "", endpoint.rstrip("/"))


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
