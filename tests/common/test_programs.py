"""Every program ends with a code and at most one line, never with a traceback."""

import os
import re
import signal
import subprocess
import sys

import pytest
from launch import ROOT
from shard_data import make_dataset

from text4vis.common.programs import run_program

# The page's server ends by itself; the page of keys is written in no time.
OTHERS = {"app.py", "document_config.py"}


def raises(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda: None, None, ""),
        (lambda: 3, 3, ""),
        (raises(OSError("no \x1b[31mdisk")), 1, "tool: error: no \\x1b[31mdisk\n"),
        (raises(KeyboardInterrupt()), 130, "tool: stopped; go on\n"),
    ],
)
def test_a_program_ends_with_its_code_and_a_line(main, code, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tool.py"])
    with pytest.raises(SystemExit) as ended:
        run_program(main, OSError, stopped="stopped; go on")
    assert ended.value.code == code
    assert capsys.readouterr().err == line


def test_other_errors_are_mistakes_of_ours_and_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(raises(ZeroDivisionError()), OSError)


def test_ctrl_c_in_a_real_process():
    program = (
        "import signal, time\nfrom text4vis.common.programs import run_program\n"
        # Where the tests were started in the background, a shell has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def main():\n    print('ready', flush=True)\n    time.sleep(60)\nrun_program(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "-c: stopped\n"
    assert process.returncode == 130


@pytest.mark.parametrize("name", sorted({path.name for path in (ROOT / "tools").glob("*.py")} - OTHERS))
def test_every_tool_ends_so(name):
    text = (ROOT / "tools" / name).read_text(encoding="utf-8")
    assert re.search(r'\nif __name__ == "__main__":\n    run_program\(main\b[^\n]*\)\n\Z', text)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_are_printed_whatever_the_encoding(encoding):
    code = "from text4vis.common.programs import run_program; run_program(lambda: print('é → 走'))"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False, cwd=ROOT)
    shown = "\\xe9" if encoding == "ascii" else "é"
    assert (done.returncode, done.stdout.decode(encoding).strip()) == (0, f"{shown} \\u2192 \\u8d70"), done.stderr


def test_a_name_that_the_locale_lacks_is_named():
    code = "import pathlib; from text4vis.common.programs import run_program as run; run(pathlib.Path('\\u8d70').stat)"
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1 and done.stderr.startswith("-c: error: '\\u8d70': ") and "LC_ALL=C.UTF-8" in done.stderr


def test_a_mapped_file_that_is_cut_while_it_is_read_is_named_by_its_signal(tmp_path):
    """The kernel then kills whoever looks at it; no exception could be raised."""
    make_dataset(tmp_path / "data", [1] * 500)
    program = (
        "import os, sys\nfrom shards.reader import open_dataset\n"
        "from text4vis.common.programs import run_program\n"
        "def main():\n    with open_dataset(sys.argv[1]) as dataset:\n        os.truncate(sys.argv[2], 128)\n"
        "        dataset.name(499)\nrun_program(main)"
    )
    (names,) = (tmp_path / "data").glob("index/names*.npy")
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "data", names],
        cwd=ROOT, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.startswith("Fatal Python error: Bus error") and 'shards/index.py", line' in done.stderr
