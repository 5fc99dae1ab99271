"""APIs for operators and monitoring, of a host and of a hub, and their client; no work of their own."""
