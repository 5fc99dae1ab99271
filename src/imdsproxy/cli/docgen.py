"""`python -m imdsproxy.cli.docgen [REFERENCE [PACKAGING]]`: write what is made of the code.

Pages go to docs/reference, manual pages and completions to packaging.
"""

from __future__ import annotations

import sys
from pathlib import Path

from imdsproxy.cli.manpages import write_packaging
from imdsproxy.cli.reference_pages import write_pages

if __name__ == "__main__":
    write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/reference"))
    write_packaging(Path(sys.argv[2] if len(sys.argv) > 2 else "packaging"))  # noqa: PLR2004 - the second
