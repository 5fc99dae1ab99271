"""Upstream `nova`: choice of the metadata API for an instance, endpoints, secrets and signatures; no HAProxy rules."""
