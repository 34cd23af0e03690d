"""Where the relative paths of a configuration begin.

In a YAML file they begin at the file's folder, so that a recipe opens from any working folder. On the command line and
behind an environment variable they begin at the working folder, as everywhere in a shell. Addresses, absolute paths
and names of models stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from shards.text import SCHEME

# What the files of a network end with: other values of network.arch and network.pretrained are names.
NETWORK_SUFFIXES = (".json", ".safetensors", ".pt", ".pth", ".bin")
LOCAL_MODEL = "local-dir:"  # open_clip's mark of a folder
RUN_CONFIG = "config.yaml"
_ABSOLUTE_BRACES = re.compile(r"\{(|.*,)(/|~|[A-Za-z][\w+.-]*://)")  # {/a,/b}, {s3://a,s3://b}


def absolute(value: str, folder: Path) -> str:
    """The absolute path of `value` seen from `folder`; addresses and absolute paths are returned unchanged.

    The result has no `.` and no leading `..`, and names the file that `folder / value` names, links included. Raises
    ValueError for a `~` of an unknown home and for a NUL.
    """
    if "\0" in value:
        raise ValueError("no file's name holds the character NUL; write the path without it")
    if not value or SCHEME.match(value) or value.startswith("pipe:") or "::" in value:
        return value  # what is no address at all is refused where it is opened
    if value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError("this home is not known (is HOME set?); write the whole path") from None
    if Path(value).is_absolute() or _ABSOLUTE_BRACES.match(value):
        return value
    folder, parts = folder.absolute(), Path(value).parts
    folder = folder.resolve() if ".." in folder.parts else folder
    while parts[:1] == ("..",):
        # The parent of a link's target is another folder than the parent of the link.
        folder, parts = (folder.resolve() if folder.is_symlink() else folder).parent, parts[1:]
    return str(folder.joinpath(*parts))


def absolute_model(value: str, folder: Path) -> str:
    """`absolute` for what may be a name, of a model or of its weights: a file begins with `./`, `../`, `/` or `~`, or
    ends with one of NETWORK_SUFFIXES."""
    if value.startswith(LOCAL_MODEL):
        return LOCAL_MODEL + absolute(value.removeprefix(LOCAL_MODEL), folder)
    is_file = value.startswith(("./", "../", "/", "~")) or value.endswith(NETWORK_SUFFIXES)
    return absolute(value, folder) if is_file else value


def same_path(one: object, other: object) -> bool:
    """Whether two values of a key that takes a path name the same file.

    What version 0.1 recorded is relative, and begins at the working folder.
    """
    if isinstance(one, str) and isinstance(other, str):
        return one == other or Path(one).absolute() == Path(other).absolute()
    return one == other


def start_of(origin: str) -> Path:
    """The folder at which paths begin in a value that comes from `origin`, a YAML file or "--set".

    What a run wrote in its config.yaml is absolute; version 0.1 wrote paths that begin at the working folder.
    """
    path = Path(origin)
    is_of_run = path.name == RUN_CONFIG and (path.parent / "checkpoints").is_dir()
    return Path() if origin == "--set" or is_of_run else path.parent
