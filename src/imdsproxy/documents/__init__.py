"""Documents for guests: dialects, document server and resolver; nothing that knows sources or HAProxy's rules."""
