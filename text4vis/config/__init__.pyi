from .schema import Config as Config
from .schema import ConfigError as ConfigError
from .schema import DataConfig as DataConfig
from .schema import EngineConfig as EngineConfig
from .schema import LoggingConfig as LoggingConfig
from .schema import NetworkConfig as NetworkConfig
from .schema import SolverConfig as SolverConfig
from .schema import load_config as load_config
