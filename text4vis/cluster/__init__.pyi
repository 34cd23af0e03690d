from .distributed import Ranks as Ranks
from .distributed import device as device
from .distributed import ranks as ranks
from .stop import StopRequest as StopRequest
from .watch import Watch as Watch
