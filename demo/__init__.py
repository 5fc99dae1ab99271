"""The demonstration: three networks with the same addresses, and what each guest in them reads."""
