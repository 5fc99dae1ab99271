"""Process of `imdsproxy run`: its parts and loops, their order, and reload; nothing that one feature owns."""
