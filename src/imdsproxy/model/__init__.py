"""Values and rules of all rooms: records, inventory, identity, policy, tokens. Pure: no I/O, clock or randomness."""
