"""The measurements of docs/performance.md: figures beside a bare HAProxy, and counts."""
