"""What all programs share: tables on the console, progress bars, and stages that run other programs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
