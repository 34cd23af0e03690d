from .exporting import export as export
from .pictures import save_prediction as save_prediction
from .pictures import save_timeline as save_timeline
from .predictor import Prediction as Prediction
from .predictor import PredictionError as PredictionError
from .predictor import Predictor as Predictor
from .predictor import Timeline as Timeline
