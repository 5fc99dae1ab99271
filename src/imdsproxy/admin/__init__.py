"""Interfaces for operators and monitoring: admin API, health, metrics."""
