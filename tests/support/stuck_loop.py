"""imdsproxy's command line, whose event loop gets stuck at SIGUSR2: the process lives, its main thread waits for ever.

Run as a program, with the arguments of `imdsproxy`.
"""

import signal
import sys
import threading

if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, lambda _number, _frame: threading.Event().wait())

    from imdsproxy.cli.main import main

    sys.exit(main())
