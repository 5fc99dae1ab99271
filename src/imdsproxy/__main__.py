"""`python -m imdsproxy` is `imdsproxy`."""

from __future__ import annotations

import sys

from imdsproxy.cli.main import main

sys.exit(main())
