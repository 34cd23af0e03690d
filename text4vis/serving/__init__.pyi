from .export import export as export
from .predictor import Prediction as Prediction
from .predictor import PredictionError as PredictionError
from .predictor import Predictor as Predictor
from .predictor import Timeline as Timeline
