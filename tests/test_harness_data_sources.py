"""Data sources: layouts that are found, and mistakes that are named in one line."""

from __future__ import annotations

import json

import datasets
import pytest
from harness_world import mme_rows, png, pope_rows, write_parquet

import tasks
from harness.data_sources import DEMO_LABEL, Source, without_images
from tasks.errors import UserError

POPE, MME = tasks.load("pope"), tasks.load("mme")


def folder(path) -> Source:
    return Source.parse(str(path))


def test_demo_and_styles():
    source = Source.parse("demo", "heldout")
    assert (source.name, source.label) == ("demo-heldout", DEMO_LABEL)
    assert Source.parse("hub").label is None
    for arguments, message in (
        (("demo", "heldot"), "unknown style 'heldot'; known, nearest first: heldout"),
        (("hub", "seen"), "--style seen needs --data demo"),
        (("no/such/folder", None), "no data folder 'no/such/folder'"),
    ):
        with pytest.raises(UserError, match=message):
            Source.parse(*arguments)


@pytest.mark.parametrize(
    "name", ["pope.parquet", "pope/a.parquet", "POPE/data/test-00000-of-00001.parquet"]
)
def test_layouts(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_parquet(pope_rows(), tmp_path / name)
    rows = folder(tmp_path).load(POPE, "paper")
    assert len(rows) == 24
    assert rows[0]["image"]["bytes"] == pope_rows()[0]["image"]["bytes"]  # undecoded
    assert "image" not in without_images(rows).column_names
    assert not folder(tmp_path).has(MME)


def test_published_split_is_picked_among_others(tmp_path):
    data = tmp_path / "POPE" / "data"
    data.mkdir(parents=True)
    write_parquet(pope_rows(images=2), data / "test-00000-of-00001.parquet")
    write_parquet(pope_rows(images=3), data / "adversarial-00000-of-00001.parquet")
    assert len(folder(tmp_path / "POPE").load(POPE, "paper")) == 12


def test_jsonl_with_image_files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "dog.png").write_bytes(png((1, 2, 3)))
    rows = [{**row, "image": "dog.png", "answer": "2019-01-01"} for row in mme_rows()]
    (tmp_path / "mme.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    loaded = folder(tmp_path).load(MME, "paper")
    assert loaded[0]["image"]["path"] == str(tmp_path / "images" / "dog.png")
    assert loaded[0]["answer"] == "2019-01-01"  # text stays text


def test_missing_task_file_says_what_was_found(tmp_path):
    write_parquet(mme_rows(), tmp_path / "mme.parquet")
    with pytest.raises(UserError, match=r"expected pope.parquet.*found mme.parquet"):
        folder(tmp_path).check(POPE)


def test_missing_column_is_named(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "category"} for row in pope_rows()]
    write_parquet(rows, tmp_path / "pope.parquet")
    with pytest.raises(UserError, match=r"no column 'category' for task 'pope'.*it has: .*answer"):
        folder(tmp_path).load(POPE, "paper")


def test_missing_image_column_is_named(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "image"} for row in pope_rows()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pope.parquet")
    with pytest.raises(UserError, match="no column 'image'"):
        folder(tmp_path).load(POPE, "paper")


def test_column_of_the_wrong_type_is_named(tmp_path):
    write_parquet([{**row, "question": 5} for row in pope_rows()], tmp_path / "pope.parquet")
    with pytest.raises(UserError, match=r"pope: row 1 cannot be used.*question"):
        folder(tmp_path).load(POPE, "paper")
    datasets.Dataset.from_list([{**row, "image": 3} for row in pope_rows()]).to_parquet(
        tmp_path / "pope.parquet"
    )
    with pytest.raises(UserError, match="column 'image' holds .*not images"):
        folder(tmp_path).load(POPE, "paper")


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"\x00" * 100])
def test_broken_parquet(tmp_path, content):
    (tmp_path / "pope.parquet").write_bytes(content)
    with pytest.raises(UserError, match="not a readable parquet file"):
        folder(tmp_path).load(POPE, "paper")


def test_truncated_parquet(tmp_path):
    path = write_parquet(pope_rows(images=20), tmp_path / "pope.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:200] + b"\x00" * 3000 + data[3200:])
    with pytest.raises(UserError, match="cannot read"):
        folder(tmp_path).load(POPE, "paper")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "line 1 is not JSON"),
        (b"[1, 2]", "line 1 is not a JSON object"),
        (b'{"question": "a"}', "line 1: no column 'answer'"),
        (b"\xff\xfe{}", "as UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"", "has no rows"),
    ],
)
def test_broken_jsonl(tmp_path, text, message):
    (tmp_path / "pope.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=message):
        folder(tmp_path).load(POPE, "paper")


def test_jsonl_with_mixed_types(tmp_path):
    rows = pope_rows(images=1)
    for row, answer in zip(rows, ["yes", 3, ["no"]] * 2, strict=True):
        row |= {"image": None, "answer": answer}
    (tmp_path / "pope.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="mixes types"):
        folder(tmp_path).load(POPE, "paper")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link/secret.png"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_image_paths_stay_inside(tmp_path, name, kind):
    (tmp_path / "secret.png").write_bytes(png((1, 1, 1)))
    data = tmp_path / "data"
    data.mkdir()
    (data / "link").symlink_to(tmp_path)
    rows = pope_rows()
    if kind == "jsonl":
        rows = [{**row, "image": name} for row in rows]
        (data / "pope.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        rows[3]["image"] = {"bytes": None, "path": name}
        datasets.Dataset.from_list(rows).to_parquet(data / "pope.parquet")
    with pytest.raises(UserError, match="leads out of the data folder"):
        folder(data).load(POPE, "paper")


def test_hub_without_a_network_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"lmms-lab/POPE could not be fetched .*--data DIR"
    ) as error:
        Source.parse("hub").load(POPE, "paper")
    assert "\n" not in str(error.value)
