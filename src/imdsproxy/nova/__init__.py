"""Upstream `nova`: settings, endpoints, secrets and monitoring."""
