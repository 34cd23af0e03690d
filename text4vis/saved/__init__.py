"""What lies on disk: runs, checkpoints, exports, and the original project's .pt files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
