"""Data sets that several test files of this room read; none changes them."""

import av
import numpy as np
import pytest
from batches import build
from frame_folders import make_frame_folders
from PIL import Image
from sklearn.datasets import load_sample_image

from shards.annotations import parse_annotations
from shards.writer import build_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """23 videos of 1 to 20 frames of 48 x 32."""
    base = tmp_path_factory.mktemp("pipeline")
    folders = make_frame_folders(base, [1 + 3 * i % 20 for i in range(23)])
    return build(folders.annotations, folders.root, folders.labels, base / "shards")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Three videos that pan over real photographs, 30 frames each, in three sizes."""
    base = tmp_path_factory.mktemp("photographs")
    lines = []
    for number, (name, size) in enumerate([("china", (341, 256)), ("flower", (480, 270)), ("china", (200, 320))]):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg")).resize((size[0] + 30, size[1]))
        folder = base / "frames" / f"video{number}"
        folder.mkdir(parents=True)
        for frame in range(30):
            crop = picture.crop((frame, 0, frame + size[0], size[1]))
            crop.save(folder / f"img_{frame + 1:05d}.jpg", quality=90)
        lines.append(f"video{number} 30 {number}")
    (base / "list.txt").write_text("\n".join(lines))
    (base / "labels.csv").write_text("id,name\n0,a\n1,b\n2,c\n")
    return build(base / "list.txt", base / "frames", base / "labels.csv", base / "shards"), base / "frames"


@pytest.fixture(scope="session")
def stored_videos(tmp_path_factory):
    """Three short H.264 files with B-frames, stored as they are, and their decoded frames by name."""
    base = tmp_path_factory.mktemp("videos")
    picture = np.asarray(Image.fromarray(load_sample_image("flower.jpg")).resize((160, 120)))
    for number in range(3):
        with av.open(str(base / f"clip {number}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
            for k in range(20 + number):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[k : k + 72, 2 * k : 2 * k + 96]))
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    (base / "list.txt").write_text("".join(f"clip {n}.mp4 {n}\n" for n in range(3)))
    annotations = parse_annotations(base / "list.txt")
    build_shards(annotations, root=base, labels=["a", "b", "c"], output=base / "shards", store="video")
    return base
