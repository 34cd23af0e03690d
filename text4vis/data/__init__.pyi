from .datasets import open_split as open_split
from .loader import Batch as Batch
from .loader import Loader as Loader
from .loader import build_loader as build_loader
from .sampling import test_indices as test_indices
from .sampling import train_indices as train_indices
from .sampling import val_indices as val_indices
