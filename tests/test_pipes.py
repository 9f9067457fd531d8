"""`COMMAND | head` ends without a word, whichever command it is."""

from __future__ import annotations

import json
import subprocess
import sys

SPEAK = """
import sys
from vlmamba_core.cli import cli
from vlmamba_core.errors import UserError

@cli
def main(argv=None):
    if argv:
        raise UserError("a line " + "x" * 100_000)
    for number in range(100_000):
        print("line", number)

sys.exit(main(sys.argv[1:]))
"""


def piped(*command: str, stderr=subprocess.PIPE) -> tuple[int, bytes, bytes | None]:
    """(exit code, first line, stderr) of a command whose reader takes one line and leaves."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as started:
        line = started.stdout.readline()
        started.stdout.close()
        errors = started.stderr.read() if started.stderr else None
        return started.wait(), line, errors


def test_a_reader_that_leaves_ends_a_command_quietly():
    assert piped(sys.executable, "-c", SPEAK) == (141, b"line 0\n", b"")


def test_a_mistake_in_front_of_a_reader_that_left_is_quiet_too():
    command = [sys.executable, "-c", SPEAK, "mistake"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as started:
        started.stdout.close()
        assert started.wait() in (2, 141)


def test_another_broken_pipe_is_no_quiet_end():
    code = "from vlmamba_core.cli import cli\n@cli\ndef main():\n    raise BrokenPipeError\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "BrokenPipeError" in done.stderr


def test_scores_go_to_their_file_though_the_reader_left(tmp_path):
    row = {"question": "Is it?", "answer": "yes", "category": "random", "prediction": "Yes" * 999}
    path, out = tmp_path / "predictions.jsonl", tmp_path / "out.json"
    path.write_text("\n".join([json.dumps(row)] * 500))
    command = [sys.executable, "-m", "harness.score", "pope", str(path), "--per-case"]
    code, line, errors = piped(*command, "--json", str(out))
    assert (code, errors) == (141, b"")
    assert line.startswith(b"pope, protocol paper: 500 answers scored")
    assert json.loads(out.read_text())["n"] == 500
