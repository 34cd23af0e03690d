from .console import console as console
from .console import table as table
from .progress import Progress as Progress
from .progress import track as track
from .stages import Stage as Stage
from .stages import StageError as StageError
from .stages import perform as perform
