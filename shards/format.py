"""The shard format: file names, index tables, manifest and tar headers. Everything else in `shards` builds on this.

A data set is a folder (or an address with the same files under it):

    000000.tar 000001.tar ...   ordinary WebDataset tars; one video is one key, its members lie one after the other:
                                KEY.json, then KEY.000000.jpg KEY.000001.jpg ... (or the one member KEY.mp4)
    index/videos-F.npy          (N,) VIDEO_DTYPE: one row a video, in the order of the shards
    index/members-F.npy         (M,) MEMBER_DTYPE: one row a frame (or stored video); memory-mapped, never loaded whole
    index/names-F.npy           (bytes,) uint8: the original names, UTF-8, one after the other
    index/labels-F.npy          only where videos have several labels or none: (L,) int32, their labels, video by video
    index/streams-F.npy         only where stored videos can be read in parts: (N,) STREAM_DTYPE: one row a video
    index/packets-F.npy         beside it: (P,) PACKET_DTYPE: one row a packet, video by video; memory-mapped
    manifest.json               written last: its presence says that the data set is complete; names the index files

F is the first half of the data set's fingerprint: videos that are added later come with new index files, so the old
manifest stays valid until the new one replaces it.

A data set in which every video has one label is of format version 1. One in which some have several, or none, is of
version 2, which older programs refuse: `num_labels` takes the place of `label` in the table of videos, and KEY.json
holds the lists `labels` and `classes` in place of `label` and `class`. One with the tables `streams` and `packets` is
of version 3, with several labels a video or without.

Opening costs O(videos). Where frame k of a video lies is one row of `members`, so a reader fetches just the frames
that it wants. The tars stand on their own: without index and manifest `tar` and `webdataset` still read them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from isal import isal_zlib

FORMAT_VERSION = 1
MULTI_LABEL_VERSION = 2
PACKETS_VERSION = 3
BLOCK_BYTES = 512

MANIFEST = "manifest.json"
INDEX_ROLES = ("videos", "members", "names")
LABELS_ROLE = "labels"  # where videos have several labels or none
STREAMS_ROLE, PACKETS_ROLE = "streams", "packets"  # of format version 3
MAX_FRAMES = 1_000_000  # six digits of a frame's member name
MAX_MEMBER_BYTES = 2**32 - 1

# Where a member's bytes lie: they start at `block * 512` of the shard's tar. width and height are 0 when unknown.
MEMBER_DTYPE = np.dtype(
    [("block", "<u4"), ("size", "<u4"), ("crc32", "<u4"), ("width", "<u2"), ("height", "<u2")],
)

# num_frames is the number of frames of the video; num_members equals it for stored frames and is 1 for a stored video.
# crc32 is that of the video's member checksums in order: it changes when any byte of any frame changes.
VIDEO_DTYPE = np.dtype(
    [
        ("first_member", "<u8"),
        ("name_start", "<u8"),
        ("name_size", "<u4"),
        ("num_members", "<u4"),
        ("num_frames", "<u4"),
        ("shard", "<u4"),
        ("json_block", "<u4"),
        ("json_size", "<u4"),
        ("crc32", "<u4"),
        ("label", "<i4"),
    ]
)

MULTI_LABEL_VIDEO_DTYPE = np.dtype([*VIDEO_DTYPE.descr[:-1], ("num_labels", "<u4")])
LABEL_DTYPE = np.dtype("<i4")

# How a stored video is read in parts. num_packets is 0 where it has to be read whole; the packets of a video follow
# those of the one before. packets_crc32: of its rows. Its file is opened with the bytes before `head` and from `tail`
# on, whose checksums follow.
STREAM_DTYPE = np.dtype(
    [
        ("num_packets", "<u4"),
        ("packets_crc32", "<u4"),
        ("head", "<u4"),
        ("tail", "<u4"),
        ("head_crc32", "<u4"),
        ("tail_crc32", "<u4"),
    ]
)

# A packet of the stream that is played, in the order in which a decoder takes them: its bytes in the video's file, and
# when its frame is shown, in the stream's time base. flags: KEY_PACKET, and HIDDEN_PACKET for one that is not shown.
PACKET_DTYPE = np.dtype([("offset", "<u4"), ("size", "<u4"), ("crc32", "<u4"), ("flags", "<u4"), ("pts", "<i8")])
KEY_PACKET, HIDDEN_PACKET = 1, 2


def table_dtypes(multi_label: bool, has_packets: bool = False) -> dict[str, np.dtype]:
    """{role: dtype} of the index tables of a data set."""
    dtypes = {"videos": VIDEO_DTYPE, "members": MEMBER_DTYPE, "names": np.dtype(np.uint8)}
    if multi_label:
        dtypes |= {"videos": MULTI_LABEL_VIDEO_DTYPE, LABELS_ROLE: LABEL_DTYPE}
    return dtypes | {STREAMS_ROLE: STREAM_DTYPE, PACKETS_ROLE: PACKET_DTYPE} if has_packets else dtypes


def table_header(dtype: np.dtype, length: int) -> bytes:
    """The first bytes of the .npy file of a table of `length` rows."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": description, "fortran_order": False, "shape": (length,)})
    return header.getvalue()


# Refused in names of classes and videos: terminals, logs and text encoders each treat them differently.
CONTROL_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f]")


class ShardError(Exception):
    """Bad data set, list or address. The message names the place, the value and the fix."""


class SampleError(ShardError):
    """One video is bad whenever it is read: wrong bytes, no image, a size beyond the limits.

    Not raised when a store, disk or network fails, for the video itself may be sound.
    """


@dataclass(frozen=True)
class ShardInfo:
    """One tar of the data set."""

    name: str
    bytes: int
    videos: int
    members: int


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    content: "frames" (one member a frame) or "video" (the encoded file is the one member).
    classes: class names, the label is the position. build: the settings the data set was built with.
    skipped: inputs that were left out on request, as {"name", "line", "reason"}.
    index: for each of `roles` its {"file", "bytes", "crc32"}.
    version: FORMAT_VERSION; MULTI_LABEL_VERSION where videos have several labels or none; PACKETS_VERSION where stored
        videos can be read in parts.
    tars: None for shards that we wrote. Else the place of tars that others wrote, below which the names of `shards`
        lie: an address, or "." for beside the manifest.
    """

    content: str
    classes: list[str]
    num_videos: int
    num_members: int
    fingerprint: str
    shards: list[ShardInfo]
    index: dict[str, dict[str, Any]]
    build: dict[str, Any] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    version: int = FORMAT_VERSION
    tars: str | None = None

    @property
    def multi_label(self) -> bool:
        """Whether a video may have several labels, or none."""
        return self.version == MULTI_LABEL_VERSION or LABELS_ROLE in self.index

    @property
    def has_packets(self) -> bool:
        """Whether stored videos can be read in parts."""
        return self.version == PACKETS_VERSION

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """{role: dtype} of the index tables."""
        return table_dtypes(self.multi_label, self.has_packets)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the index tables."""
        return tuple(self.dtypes)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        content = asdict(self)
        if self.tars is None:
            del content["tars"]
        return json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parses and checks `manifest.json`; `where` names it in errors. Raises ShardError.

        The file may come from a stranger: every file it names is inside the data set's own folder.
        """
        try:
            raw = json.loads(text)
            if raw.get("version") not in (FORMAT_VERSION, MULTI_LABEL_VERSION, PACKETS_VERSION):
                raise ShardError(
                    f"{where}: format version {raw.get('version')!r}, this program reads {FORMAT_VERSION} to "
                    f"{PACKETS_VERSION}; rebuild the data set with build_shards"
                )
            raw["shards"] = [ShardInfo(**shard) for shard in raw["shards"]]
            manifest = cls(**raw)
            _check_manifest(manifest)
        except ShardError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ShardError(f"{where}: not a valid manifest ({error}); rebuild with build_shards") from error
        return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError that says what is wrong."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise ValueError(message)

    def is_count(value: object) -> bool:
        return type(value) is int and 0 <= value < 2**63

    require(manifest.content in ("frames", "video"), f"content is {manifest.content!r}, not 'frames' or 'video'")
    require(isinstance(manifest.classes, list), "classes is not a list")
    require(all(isinstance(name, str) for name in manifest.classes), "a class name is not a string")
    for name in filter(CONTROL_CHARACTER.search, manifest.classes):
        require(False, f"the class name {name!r} holds a control character")
    require(is_count(manifest.num_videos) and is_count(manifest.num_members), "num_videos or num_members is no count")
    require(re.fullmatch("[0-9a-f]{64}", manifest.fingerprint) is not None, "fingerprint is not 64 hex digits")
    require(isinstance(manifest.build, dict) and isinstance(manifest.skipped, list), "build or skipped has a bad type")
    require(manifest.tars is None or isinstance(manifest.tars, str), "tars is no address")
    for number, shard in enumerate(manifest.shards):
        if manifest.tars is None:
            require(
                shard.name == shard_name(number), f"shard {number} is named {shard.name!r}, not {shard_name(number)}"
            )
        else:
            problem = tar_place_problem(shard.name)
            require(problem is None, f"the name of shard {number}, {shard.name!r}, {problem}")
        require(all(map(is_count, (shard.bytes, shard.videos, shard.members))), f"{shard.name} has a bad count")
    require(sum(shard.videos for shard in manifest.shards) == manifest.num_videos, "shards do not add up to num_videos")
    require(
        sum(shard.members for shard in manifest.shards) == manifest.num_members, "shards do not add up to num_members"
    )
    has_labels = manifest.version == FORMAT_VERSION and manifest.multi_label
    roles_fit = set(manifest.index) == set(manifest.roles) and not has_labels
    require(roles_fit, f"index has the roles {sorted(manifest.index)}")
    require(not manifest.has_packets or manifest.content == "video", "it stores frames and has a table of packets")
    for role, entry in manifest.index.items():
        require(set(entry) == {"file", "bytes", "crc32"}, f"index {role} has the keys {sorted(entry)}")
        require(
            re.fullmatch(rf"index/{role}-[0-9a-f]{{32}}\.npy", entry["file"]) is not None,
            f"index {role} is named {entry['file']!r}",
        )
        require(is_count(entry["bytes"]) and is_count(entry["crc32"]), f"index {role} has a bad size or checksum")


def tar_place_problem(name: object) -> str | None:
    """What is wrong with the name of a tar below its place; None if it stays below it."""
    if not isinstance(name, str) or not name or CONTROL_CHARACTER.search(name) or re.search(r"[?#\\]", name):
        return "is empty or holds a control character, '?', '#' or a backslash"
    if any(part in {"", ".", ".."} for part in name.split("/")):
        return "leads out of its place"
    return None


def index_file(role: str, fingerprint: str) -> str:
    """Path inside the data set of an index table; role is one of `Manifest.roles`."""
    return f"index/{role}-{fingerprint[:32]}.npy"


def shard_name(number: int) -> str:
    """File name of the number-th shard of a data set."""
    return f"{number:06d}.tar"


def video_key(number: int) -> str:
    """WebDataset key of the number-th video of a data set. No dots: WebDataset ends a key at the first one."""
    return f"{number:09d}"


def frame_suffix(frame: int, extension: str) -> str:
    """Member name after `KEY.` of a frame, e.g. `000007.jpg`."""
    return f"{frame:06d}.{extension}"


def _header_template() -> tuple[bytes, int]:
    """Header of an empty name and size 0, and the sum of its bytes with the checksum field as blanks."""
    template = tarfile.TarInfo("").tobuf(format=tarfile.USTAR_FORMAT)
    return template, sum(template[:148]) + sum(b" " * 8) + sum(template[156:])


_TEMPLATE, _TEMPLATE_SUM = _header_template()
_ZERO_SIZE_SUM = sum(b"0" * 11)


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file, the same for the same arguments (mtime 0, owner 0, mode 0644).

    Equals `tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)`, about ten times faster: only name, size and checksum
    differ from one member to the next. name: at most 100 ASCII characters. size: below 8 GiB. Raises ValueError.
    """
    name_bytes = name.encode("ascii")
    digits = b"%011o" % size
    if len(name_bytes) > 100 or len(digits) > 11:
        raise ValueError(f"no ustar header for a name of {len(name_bytes)} bytes and {size} bytes of data")
    checksum = _TEMPLATE_SUM + sum(name_bytes) + sum(digits) - _ZERO_SIZE_SUM
    return b"%s%s%s%s%06o\0%s" % (
        name_bytes.ljust(100, b"\0"),
        _TEMPLATE[100:124],
        digits,
        _TEMPLATE[135:148],
        checksum,
        _TEMPLATE[155:],
    )


def padding(size: int) -> int:
    """Zero bytes that fill the last block of a member of `size` bytes."""
    return -size % BLOCK_BYTES


def video_crc32(members: np.ndarray) -> int:
    """Checksum of a video: the CRC-32 of its members' CRC-32s, little endian, in order."""
    return isal_zlib.crc32(np.ascontiguousarray(members["crc32"]).astype("<u4").tobytes())


def rows_crc32(rows: np.ndarray) -> int:
    """Checksum of a video's packet rows: the CRC-32 of their bytes."""
    return isal_zlib.crc32(rows.tobytes())


def fingerprint(
    videos: np.ndarray, names: np.ndarray, classes: list[str], content: str, labels: np.ndarray | None = None
) -> str:
    """Identity of a data set's content and order: names, labels, frame counts and checksums, class names.

    Where the bytes lie (shard, block) does not enter: the same videos in the same order have the same fingerprint
    however they are cut into shards. labels: the table of a data set with several labels a video.
    """
    digest = hashlib.sha256()
    version, column = (FORMAT_VERSION, "label") if labels is None else (MULTI_LABEL_VERSION, "num_labels")
    digest.update(json.dumps([version, content, classes], ensure_ascii=False).encode())
    for name in ("name_size", "num_frames", "crc32", column):
        digest.update(np.ascontiguousarray(videos[name]).tobytes())
    digest.update(np.ascontiguousarray(names).tobytes())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()
