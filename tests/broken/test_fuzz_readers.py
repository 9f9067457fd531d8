"""Random damage to every reader: what comes out is rows, or one of the project's own errors.

pytest tests/broken/test_fuzz_readers.py -m fuzz      # the long runs
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_harness_compare import write_run
from test_harness_plots import write_profile

import tasks
from harness import report
from harness.data.readers import read_rows
from harness.data.sources import Source
from harness.reporting import publish
from harness.runs.store import EvaluationRun, find
from harness.score import read, score
from vlmamba.config import VLMambaConfig
from vlmamba.data import llava
from vlmamba.weight_files import model_files, tensors
from vlmamba_core import errors as model_errors
from vlmamba_core.errors import UserError

RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
CLEAR = (UserError, model_errors.UserError)
POPE = tasks.load("pope")
ROWS = [
    {"question": f"Is it {i}?", "answer": "yes", "category": "random", "image": None}
    for i in range(3)
]
LLAVA = [
    {"id": i, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    for i in range(3)
]
TABLE = 'index\tquestion\tA\tB\timage\n1\t"a ""b""\nc"\tx\ty\tiVBO\n2\td\tx\ty\t1\n'
HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "__metadata__": {"k": "v"},
}
CONFIG = {"model_type": "vlmamba", "d_model": 32, "n_layer": 2, "vocab_size": 320}

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "/etc/hostname", "\0", "\ud800", 2**70, -1, 0, 1e308, "<script>"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=4,
)


@dataclass(frozen=True)
class Edit:
    """A cut, or other bytes at one place."""

    place: float  # of the file's length
    removed: int
    added: bytes

    def apply(self, data: bytes) -> bytes:
        at = int(self.place * len(data))
        return data[:at] + self.added + data[at + self.removed :]


EDITS = st.lists(
    st.builds(
        Edit,
        st.floats(0, 1),
        st.integers(0, 40),
        st.binary(max_size=8)
        | st.sampled_from([b"[", b"{", b'"', b"\n", b"\t", b"\xff", b"nan", b","]),
    ),
    min_size=1,
    max_size=4,
)


def safetensors(header: bytes, length: int | None = None) -> bytes:
    """A file of six numbers under a header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + b"\0" * 24


def read_llava(path: Path) -> None:
    llava.index_samples(llava.LlavaFile(path), None, image_tokens=4, progress=False)


def load_data(path: Path) -> None:
    for row in Source.parse(str(path.parent)).load(POPE, "paper"):
        assert isinstance(row["question"], str)


def score_file(path: Path) -> None:
    rows = read(POPE, path).rows
    report_ = score(POPE, rows, "paper")
    assert report_.n + sum(report_.excluded.values()) == len(rows)


def read_tensors(path: Path) -> None:
    list(tensors([path]))


Reader = Callable[[Path], object]
# name -> (file name, whole content, reader)
FILES: dict[str, tuple[str, bytes, Reader]] = {
    "JSON": ("a.json", json.dumps(ROWS).encode(), read_rows),
    "JSON lines": ("a.jsonl", "\n".join(map(json.dumps, ROWS)).encode(), read_rows),
    "TSV": ("a.tsv", TABLE.encode(), read_rows),
    "CSV": ("a.csv", TABLE.replace("\t", ",").encode(), read_rows),
    "data": ("pope.jsonl", "\n".join(map(json.dumps, ROWS)).encode(), load_data),
    "data in a table": (
        "pope.tsv",
        b"question\tanswer\tcategory\timage\na\tb\tc\td\n",
        load_data,
    ),
    "data in a CSV": (
        "pope.csv",
        b"question,answer,category,image\na,b,c,d\n",
        load_data,
    ),
    "predictions": (
        "p.jsonl",
        "\n".join(json.dumps(row | {"prediction": "Yes"}) for row in ROWS).encode(),
        score_file,
    ),
    "LLaVA": ("a.json", json.dumps(LLAVA).encode(), read_llava),
    "safetensors": ("a.safetensors", safetensors(json.dumps(HEADER).encode()), read_tensors),
}


def check_bytes(name: str, edits: list[Edit]) -> None:
    """Damage a file and read it."""
    file, whole, reader = FILES[name]
    for edit in edits:
        whole = edit.apply(whole)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file
        path.write_bytes(whole)
        try:
            reader(path)
        except CLEAR as error:
            assert str(error)


@pytest.mark.parametrize("name", FILES)
@settings(RELAXED, max_examples=50)
@given(edits=EDITS)
def test_damaged_bytes(name, edits):
    check_bytes(name, edits)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", FILES)
@settings(RELAXED, max_examples=5000)
@given(edits=EDITS)
def test_damaged_bytes_for_long(name, edits):
    check_bytes(name, edits)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every entry inside a JSON value."""
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list) else []
    return [(*path, key) for key, _ in inner] + [
        found for key, entry in inner for found in places(entry, (*path, key))
    ]


def replaced(value: Any, path: tuple, junk: Any) -> Any:
    """The value with junk in one place; the entry is taken away where junk is "GONE"."""
    whole = copy.deepcopy(value)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if junk == "GONE":
        del inner[path[-1]]
    else:
        inner[path[-1]] = junk
    return whole


def show_runs(folder: Path) -> None:
    publish.all_tables(find(folder))
    [run] = [path.parent for path in folder.rglob("record.json")]
    report.main([str(run), "--out", str(folder / "r.html"), "--no-images"])


def load_llava_record(value: Any) -> None:
    try:
        llava.parse_sample(json.dumps(value).encode())
    except llava.SampleError as error:
        assert str(error)


def read_header(value: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(safetensors(json.dumps(value).encode("utf-8", "replace")))
        read_tensors(path)


def read_config(value: Any) -> None:
    """The configuration alone, and the folder's check of it against weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(value))
        name = "language_model.embedding.weight"
        header = {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
        (Path(folder) / "model.safetensors").write_bytes(safetensors(json.dumps(header).encode()))
        with pytest.raises(CLEAR):
            model_files(Path(folder))
    VLMambaConfig(**{name: field for name, field in value.items() if name != "model_type"})


def show(write: Callable[[Path], Path], name: str = "record.json") -> Callable[[Any], None]:
    """Everything that tables and a report make of a run whose record is `value`."""

    def check(value: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run = write(Path(folder) / "runs" / "a")
            lines = value if isinstance(value, list) else [value]
            (run / name).write_text("\n".join(map(json.dumps, lines)))
            if name != "record.json":
                EvaluationRun.read(run).samples("pope")
            show_runs(Path(folder) / "runs")

    return check


def evaluation(folder: Path) -> Path:
    return write_run(folder, [1, 0])


def content(write: Callable[[Path], Path], name: str = "record.json") -> Any:
    """What a whole run's file holds."""
    with tempfile.TemporaryDirectory() as folder:
        text = (write(Path(folder) / "a") / name).read_text()
    return json.loads(text) if name == "record.json" else [json.loads(x) for x in text.splitlines()]


# name -> (whole value, check)
VALUES: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "record of an evaluation": (content(evaluation), show(evaluation)),
    "answers": (content(evaluation, "samples_pope.jsonl"), show(evaluation, "samples_pope.jsonl")),
    "record of a profile": (content(write_profile), show(write_profile)),
    "LLaVA record": (LLAVA[0], load_llava_record),
    "safetensors header": (HEADER, read_header),
    "configuration": (CONFIG, read_config),
}


def check_value(name: str, data: st.DataObject) -> None:
    """Put junk in one place of a JSON value and use it."""
    whole, check = VALUES[name]
    path = data.draw(st.sampled_from(places(whole)))
    value = replaced(whole, path, data.draw(st.just("GONE") | JUNK))
    try:
        check(value)
    except CLEAR as error:
        assert str(error)


SHORT = {"record of a profile": 15}  # its report draws plots


@pytest.mark.parametrize("name", VALUES)
def test_junk_in_a_value(name):
    @settings(RELAXED, max_examples=SHORT.get(name, 50))
    @given(data=st.data())
    def check(data):
        check_value(name, data)

    check()


@pytest.mark.fuzz
@pytest.mark.parametrize("name", VALUES)
@settings(RELAXED, max_examples=2000)
@given(data=st.data())
def test_junk_in_a_value_for_long(name, data):
    check_value(name, data)
