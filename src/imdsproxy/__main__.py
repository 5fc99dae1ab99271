"""`python -m imdsproxy` is `imdsproxy`."""

import sys

from imdsproxy.cli.main import main

sys.exit(main())
