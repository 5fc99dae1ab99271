"""HAProxy's configuration as typed values, and their text."""
