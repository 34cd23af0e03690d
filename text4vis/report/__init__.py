"""What people look at: TensorBoard, the HTML page of runs, and pictures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
