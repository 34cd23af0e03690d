from .page import read_examples as read_examples
from .page import read_runs as read_runs
from .page import render as render
