"""From shards to batches of uint8 frames: sampling, augmentation, planning, decoding and loading."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
