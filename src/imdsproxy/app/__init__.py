"""Composition root, reconcile loop and supervision."""
