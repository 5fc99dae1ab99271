"""The composition root, the reconcile loop and supervision."""
