from .preprocessing import settle as settle
from .video_clip import VideoClip as VideoClip
from .video_clip import build_model as build_model
