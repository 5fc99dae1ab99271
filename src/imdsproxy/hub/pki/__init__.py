"""Certificates of a fleet: authority, enrolment, and a hub's files."""
