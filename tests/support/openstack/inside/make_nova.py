"""Makes Nova's databases by Nova's own commands, in one process; runs in Nova's environment, in the lab's directory."""

import sys

from nova.cmd import manage


def main(config_file: str) -> None:
    # Its own imports: manage wants to come before the rest of Nova, to choose between threads and eventlet.
    manage.config.parse_args(["nova-manage", "--config-file", config_file], default_config_files=[])
    manage.objects.register_all()
    cells = manage.CellV2Commands()
    databases = manage.DbCommands()
    for step in (
        manage.ApiDbCommands().sync,
        lambda: databases.sync(local_cell=True),
        lambda: cells.map_cell0("sqlite:///db/nova_cell0.sqlite"),
        lambda: cells.create_cell("cell1"),
        databases.sync,
    ):
        status = step()
        if status:
            sys.exit(f"a step of Nova's set-up ended with {status}")


if __name__ == "__main__":
    main(sys.argv[1])
