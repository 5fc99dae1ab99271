"""The measurements of docs/explanation/performance.md: figures beside a bare HAProxy, and counts."""
