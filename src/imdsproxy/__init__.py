"""Instance metadata for every network of a host: Python decides, HAProxy serves."""

__all__ = ["__version__"]

__version__ = "0.1.0"
