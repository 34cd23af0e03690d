from .embeddings import Pair as Pair
from .embeddings import build_classifier as build_classifier
from .embeddings import confusable_pairs as confusable_pairs
from .embeddings import save_classifier as save_classifier
