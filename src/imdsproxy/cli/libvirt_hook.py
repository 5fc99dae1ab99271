"""`imdsproxy libvirt-hook`: an instance of a fleet follows its guest when libvirt migrates that."""

from typing import Annotated

from imdsproxy.cli import options
from imdsproxy.cli.options import argument


@options.config_command
def libvirt_hook(
    run: options.Invocation,
    domain: Annotated[str, argument("DOMAIN", "The domain's name.")],
    operation: Annotated[str, argument("OPERATION", "migrate or release; others do nothing.")],
    suboperation: Annotated[str, argument("SUBOPERATION", "begin or end.")],
    extra: Annotated[str, argument("EXTRA", "Of release, why the domain has stopped.")] = "-",
) -> None:
    """What libvirt's hook runs, with the domain's XML on standard input: end a move when its guest has migrated.

    A domain that is no instance of the fleet is passed over.
    """
    from imdsproxy.cli.migration import follow  # noqa: PLC0415 - `--help` need not load it

    follow(run.settings, domain, operation, suboperation, extra)
