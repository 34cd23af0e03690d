from .optim import learning_rate as learning_rate
from .trainer import Trainer as Trainer
