"""A directory of record files as a source of records."""
