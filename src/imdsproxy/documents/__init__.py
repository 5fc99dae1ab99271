"""Documents for guests: dialects, document server, resolver; nothing that knows HAProxy or sources."""
