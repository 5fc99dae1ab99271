"""Process of `imdsproxy run`: its parts, the order of their start, and its end."""
