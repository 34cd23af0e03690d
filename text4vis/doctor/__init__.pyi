from .checks import Finding as Finding
from .checks import diagnose as diagnose
