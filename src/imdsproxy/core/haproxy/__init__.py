"""HAProxy's configuration as typed values, and as text."""
