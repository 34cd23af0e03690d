from .page import read_examples as read_examples
from .page import read_runs as read_runs
from .page import render as render
from .pictures import save_prediction as save_prediction
from .pictures import save_timeline as save_timeline
