"""What typer raises for a command line that it cannot take.

Its own class since it brings its own click; click's before, as with the typer 0.15 of Debian 13.
"""

from __future__ import annotations

try:
    from typer import TyperException as CommandLineError
except ImportError:
    from click import ClickException as CommandLineError  # type: ignore[assignment] # of one shape

__all__ = ["CommandLineError"]
