"""The upstream `nova`: its settings, its endpoints and secrets, and the watch over both."""
