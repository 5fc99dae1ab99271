"""Pages of the console: each module contains the handlers of some paths."""
