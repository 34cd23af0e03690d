"""The configuration of a run: its keys with type, meaning and role, and how it is loaded."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
