from .checkpoint import CheckpointError as CheckpointError
from .interpolation import Interpolation as Interpolation
from .opening import SavedModel as SavedModel
from .opening import TrainedModel as TrainedModel
from .opening import open_saved as open_saved
from .weights import load_text4vis as load_text4vis
