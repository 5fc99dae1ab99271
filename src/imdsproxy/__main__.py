"""Entry point of `python -m imdsproxy`, the same as `imdsproxy`."""

import sys

from imdsproxy.cli.main import main

sys.exit(main())
