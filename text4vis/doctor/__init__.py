"""Checks a machine, a recipe, its data and the hosts of a job, and says what would go wrong."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
