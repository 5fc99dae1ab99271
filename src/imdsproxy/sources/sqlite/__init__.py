"""The embedded SQLite store as a source of records."""
