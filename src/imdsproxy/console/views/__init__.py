"""The pages: each module has the functions that answer some paths."""
