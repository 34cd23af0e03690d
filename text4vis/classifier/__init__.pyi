from .embeddings import build_classifier as build_classifier
