"""`imdsproxy libvirt-hook`: moves a fleet's instance when libvirt migrates its guest."""

from typing import Annotated

from imdsproxy.cli import options
from imdsproxy.cli.options import argument


@options.config_command
def libvirt_hook(
    run: options.Invocation,
    domain: Annotated[str, argument("DOMAIN", "The domain's name.")],
    operation: Annotated[
        str, argument("OPERATION", "migrate or release; other operations are ignored.")
    ],
    suboperation: Annotated[str, argument("SUBOPERATION", "begin or end.")],
    extra: Annotated[
        str, argument("EXTRA", "With release, the reason why the domain stopped.")
    ] = "-",
) -> None:
    """Handle a call of libvirt's hook, with the domain's XML on standard input: move an instance with its guest.

    Domains that are not instances of the fleet are ignored.
    """
    from imdsproxy.tools.migration import follow

    follow(run.settings, domain, operation, suboperation, extra)
