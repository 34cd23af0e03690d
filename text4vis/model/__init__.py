"""The video model: CLIP's towers, temporal modules, heads, and named tensors in files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
