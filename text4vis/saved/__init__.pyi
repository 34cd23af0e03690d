from .checkpoint import CheckpointError as CheckpointError
from .weights import load_text4vis as load_text4vis
