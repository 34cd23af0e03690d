from .comparison import compare as compare
from .comparison import read_report as read_report
from .comparison import summarise as summarise
from .embedding import evaluate as evaluate
from .metrics import half_class_splits as half_class_splits
from .metrics import mean_average_precision as mean_average_precision
