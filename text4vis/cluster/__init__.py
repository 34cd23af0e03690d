"""Ranks and devices of a job, collectives, the watch that ends a job when a rank fails, and requests to stop."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
