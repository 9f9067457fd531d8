"""Data sources: layouts that are found, and mistakes that are named in one line."""

from __future__ import annotations

import base64
import json

import datasets
import pytest
from harness_world import mme_rows, png, pope_rows, write_parquet

import tasks
from harness.data.questions import without_images
from harness.data.sources import DEMO_LABEL, Source
from vlmamba_core.errors import UserError

POPE, MME = tasks.load("pope"), tasks.load("mme")
GQA, MMBENCH = tasks.load("gqa"), tasks.load("mmbench")


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
    with pytest.raises(UserError, match="--data-revision needs --data hub"):
        Source.parse("demo", revision="v1")
    with pytest.raises(UserError, match="--split testdev needs --data hub or a folder"):
        Source.parse("demo", split="testdev")


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


def test_a_csv_of_ones_own_names_its_pictures(tmp_path, capfd):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png((9, 9, 9)))
    table = 'question,answer,image\n"Red, or blue?",red,a.png\nNothing?,no,\nGreen?,yes,b.png\n'
    (tmp_path / "gqa.csv").write_text(table)
    rows = folder(tmp_path).load(tasks.load("gqa"), "paper")
    assert list(rows["question"]) == ["Red, or blue?", "Nothing?", "Green?"]
    assert [row["image"] and row["image"]["path"] for row in rows] == [
        *(str(tmp_path / "a.png"), None, str(tmp_path / "b.png"))
    ]
    assert "hash" not in capfd.readouterr().err  # of a library's cache, which is not asked for


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
    with pytest.raises(UserError, match=r"pope: row 1 .*column 'question' is 5"):
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
        (b"[1, 2]", "entry 1 is a number, expected a JSON object"),
        (b'{"question": "a"}', "row 1: no column 'answer'"),
        (b"\xff\xfe{}", "as UTF-8"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"", "is empty"),
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
    with pytest.raises(UserError, match="column 'answer' mixes types"):
        folder(tmp_path).load(POPE, "paper")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link/../../secret.png"])
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


def test_links_that_the_user_made_are_followed(tmp_path):
    store = tmp_path / "store"
    (store / "val2014").mkdir(parents=True)
    (store / "val2014" / "dog.png").write_bytes(png((1, 2, 3)))
    write_parquet(pope_rows(), store / "test-00000-of-00001.parquet")
    data = tmp_path / "data"
    (data / "mme").mkdir(parents=True)
    (data / "mme" / "images").symlink_to(store / "val2014")
    rows = [{**row, "image": "dog.png"} for row in mme_rows()]
    (data / "mme" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "pope").symlink_to(store)
    path = folder(data).load(MME, "paper")[0]["image"]["path"]
    assert path == str(data / "mme" / "images" / "dog.png")
    assert len(folder(data).load(POPE, "paper")) == 24


def cached(root, revision: str, **files: int):
    """A data set as the hub's cache has it: links into a folder of blobs, named by revision."""
    top = root / "datasets--lmms-lab--POPE"
    (top / "blobs").mkdir(parents=True, exist_ok=True)
    (top / "snapshots" / revision / "data").mkdir(parents=True)
    for name, images in files.items():
        blob = top / "blobs" / f"{revision}{name}"
        write_parquet(pope_rows(images=images), blob)
        link = top / "snapshots" / revision / "data" / f"{name}-00000-of-00001.parquet"
        link.symlink_to(f"../../../blobs/{blob.name}")
    return top


def test_a_snapshot_in_the_hubs_cache(tmp_path):
    top = cached(tmp_path, "0" * 40, test=2, train=3)
    for place in (tmp_path, top, top / "snapshots" / ("0" * 40)):
        assert len(folder(place).load(POPE, "paper")) == 12
        assert len(Source.parse(str(place), split="train").load(POPE, "paper")) == 18
    cached(tmp_path, "1" * 40, test=4)
    with pytest.raises(UserError, match="several snapshots .*0000.*1111.*give the one"):
        folder(tmp_path).load(POPE, "paper")
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("1" * 40)
    assert len(folder(tmp_path).load(POPE, "paper")) == 24


HASH = "f0e719df791966ff"


def shards(root, *names: str):
    """A hub copy of POPE; the n-th of its files holds n + 1 pictures of six questions."""
    for n, name in enumerate(names):
        path = root / "POPE" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(pope_rows(images=n + 1), path)
    return root


def test_names_as_the_hub_gives_them(tmp_path):
    names = [f"{s}-00000-of-00001-{n}{HASH[1:]}" for n, s in enumerate(("train", "validation"))]
    shards(tmp_path, *names, f"test-00001-of-00002-{HASH}", f"test-00000-of-00002-0{HASH[1:]}")
    rows = folder(tmp_path).load(POPE, "paper")
    assert len(rows) == 18 + 24
    assert len(set(rows[:24]["image_source"])) == 4  # the first shard first, whatever its hash
    assert len(Source.parse(str(tmp_path), split="validation").load(POPE, "paper")) == 12
    files = folder(tmp_path).describe(POPE, rows)["files"]
    assert files == [
        f"POPE/test-00000-of-00002-0{HASH[1:]}.parquet",
        f"POPE/test-00001-of-00002-{HASH}.parquet",
    ]


def test_the_hubs_own_conversion(tmp_path):
    shards(tmp_path, "default/test/0000", "default/test/0001", "default/train/0000")
    assert len(folder(tmp_path).load(POPE, "paper")) == 6 + 12
    (tmp_path / "POPE" / "default" / "test" / "0000.parquet").unlink()
    with pytest.raises(UserError, match=r"test: 1 of 2 parquet shards are there \(found 0001"):
        folder(tmp_path).load(POPE, "paper")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("test-00000-of-00001", "part1"), r"part1.parquet does not say which split .*found part1"),
        (("a", "b"), "a.parquet, b.parquet does not say which split"),
        (("test-00000-of-00002 (1)", "test-00000-of-00002"), r"\(1\).parquet does not say"),
        ((f"test-00000-of-00004-{HASH}",), r"test: 1 of 4 parquet shards are there \(found test"),
        (("test-00000-of-00002", "test-00002-of-00002"), "2 of 2 parquet shards"),
        (("test-00000-of-00001", f"test-00000-of-00001-{HASH}"), "test is there more than once"),
        (("test-00000-of-00001", "test"), "test is there more than once"),
        (("random/test-00000-of-00001", "popular/test-00000-of-00001"), "in several folders"),
        ((f"train-00000-of-00001-{HASH}",), r"files of split train, not of test \(found train"),
    ],
)
def test_files_that_could_be_anything_are_refused(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        folder(shards(tmp_path, *names)).load(POPE, "paper")


def test_one_file_of_any_name_is_no_answer_to_a_chosen_split(tmp_path):
    assert len(folder(shards(tmp_path, "a")).load(POPE, "paper")) == 6
    with pytest.raises(UserError, match=r"a.parquet does not say .*such as validation.parquet"):
        Source.parse(str(tmp_path), split="validation").load(POPE, "paper")


def test_hub_without_a_network_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nwith details")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"lmms-lab/POPE could not be fetched .*--data DIR"
    ) as error:
        Source.parse("hub").load(POPE, "paper")
    assert "\n" not in str(error.value)


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    for shard in range(2):
        path = tmp_path / f"pope-0000{shard}-of-00002.parquet"
        write_parquet(pope_rows(images=1 + shard), path)
    assert len(folder(tmp_path).load(POPE, "paper")) == 18
    path.unlink()
    with pytest.raises(UserError, match="pope: 1 of 2 parquet shards are there"):
        folder(tmp_path).load(POPE, "paper")


def test_another_split_is_taken_by_name_only(tmp_path):
    (tmp_path / "pope").mkdir()
    write_parquet(pope_rows(), tmp_path / "pope" / "train.parquet")
    with pytest.raises(UserError, match=r"has files of split train, not of test.*--split"):
        folder(tmp_path).load(POPE, "paper")
    source = Source.parse(str(tmp_path), split="train")
    assert len(source.load(POPE, "paper")) == 24
    assert source.name.endswith("-train")


def test_line_separators_inside_a_string_do_not_end_a_row(tmp_path):
    rows = [{**row, "image": None, "question": "Is\u2028it\x85?"} for row in pope_rows()]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "pope.jsonl").write_text(text, encoding="utf-8")
    assert folder(tmp_path).load(POPE, "paper")[3]["question"] == "Is\u2028it\x85?"


def test_json_array_in_a_folder_of_its_own_with_images(tmp_path):
    (tmp_path / "mme" / "images").mkdir(parents=True)
    (tmp_path / "mme" / "images" / "dog.png").write_bytes(png((1, 2, 3)))
    rows = [{**row, "image": "dog.png"} for row in mme_rows()]
    (tmp_path / "mme" / "test.json").write_text(json.dumps(rows))
    path = folder(tmp_path).load(MME, "paper")[0]["image"]["path"]
    assert path == str(tmp_path / "mme" / "images" / "dog.png")


def mmbench_tsv(path) -> None:
    """MMBench as published: images in base64, a rotation that refers to the first row's image."""
    image = base64.b64encode(png((9, 9, 9))).decode()
    first, last = ("index", "question", "hint"), ("answer", "category", "image", "l2-category")
    columns = [*first, *"ABCD", *last, "split"]
    question, hint = '"What\nis ""it""?"', ""
    rows = [
        [7, question, hint, "cat", "None", "", "", "A", "c", image, "l2", "dev"],
        [1_000_007, question, hint, "None", "cat", "", "", "B", "c", "7", "l2", "dev"],
        [8, "Which?", "Look.", "1", "2", "3", "", "C", "c", "no image", "l2", "dev"],
    ]
    lines = ["\t".join(map(str, row)) for row in [columns, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_mmbench_as_published(tmp_path):
    mmbench_tsv(tmp_path / "MMBench_DEV_EN.tsv")
    rows = folder(tmp_path).load(MMBENCH, "paper")
    assert [row["image"]["bytes"] for row in rows][:2] == [png((9, 9, 9))] * 2
    assert rows[2]["image"]["bytes"] == b"no image"  # counted as unreadable in its turn
    assert MMBENCH.prompt(rows[0], "paper").startswith('What\nis "it"?\nA. cat\n')
    assert MMBENCH.options(rows[0]) == {"A": "cat", "B": "None"}
    report = MMBENCH.evaluate(rows.to_list()[:2], ["A", "B"], "paper")
    assert report.metrics == {"accuracy": 1.0, "vanilla_accuracy": 1.0, "l2/accuracy": 1.0}
    mmbench_tsv(tmp_path / "mmbench_dev_20230712.tsv")
    with pytest.raises(UserError, match="several tables"):
        folder(tmp_path).load(MMBENCH, "paper")


def gqa_tables(root) -> None:
    """GQA as published: questions point into a table of images."""
    for name in ("testdev_balanced_instructions", "testdev_balanced_images"):
        (root / "GQA" / name).mkdir(parents=True)
    questions = [
        {"question": "What is it?", "answer": "dog", "imageId": f"n{i % 2}", "isBalanced": True}
        for i in range(4)
    ]
    datasets.Dataset.from_list(questions).to_parquet(
        root / "GQA/testdev_balanced_instructions/testdev-00000-of-00001.parquet"
    )
    images = [{"id": f"n{i}", "image": {"bytes": png((i, i, i)), "path": None}} for i in range(2)]
    write_parquet(images, root / "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet")


def test_gqa_as_published(tmp_path):
    gqa_tables(tmp_path)
    rows = folder(tmp_path).load(GQA, "paper")
    assert [row["image"]["bytes"] for row in rows] == [png((i % 2,) * 3) for i in range(4)]
    assert "image" not in without_images(rows)[0]
    images = tmp_path / "GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
    write_parquet([{"id": "n0", "image": None}], images)
    with pytest.raises(UserError, match="imageId 'n1' .*is not among the 1 images"):
        folder(tmp_path).load(GQA, "paper")
    images.unlink()
    with pytest.raises(UserError, match="no testdev_balanced_images/ folder"):
        folder(tmp_path).load(GQA, "paper")


def test_gqa_s_pictures_are_those_beside_its_questions(tmp_path):
    """In the hub's cache with two snapshots, and beside a translation's copy of the same names."""
    top = tmp_path / "datasets--lmms-lab--GQA"
    for revision in ("0" * 40, "1" * 40):
        gqa_tables(place := tmp_path / revision[:1])
        (top / "snapshots").mkdir(parents=True, exist_ok=True)
        (place / "GQA").rename(top / "snapshots" / revision)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("1" * 40)
    for root in (top, tmp_path):
        rows = folder(root).load(GQA, "paper")
        assert [row["image"]["bytes"] for row in rows] == [png((i % 2,) * 3) for i in range(4)]
    gqa_tables(tmp_path / "both")
    gqa_tables(tmp_path / "other")
    (tmp_path / "other" / "GQA").rename(tmp_path / "both" / "GQA-ru")
    assert len(folder(tmp_path / "both").load(GQA, "paper")) == 4


def test_easy_vqa_on_the_hub_is_its_package(tmp_path, monkeypatch):
    import vlmamba.demo.benchmarks as demo

    row = {"question": "is it red?", "answer": "yes", "image_id": 1, "question_id": 1}
    write_parquet([{**row, "image": None}], tmp_path / "easy_vqa.parquet")
    monkeypatch.setattr(demo, "demo_benchmark", lambda task, split: tmp_path)
    task = tasks.load("easy_vqa")
    rows = Source.parse("hub").load(task, "paper")
    settings = Source.parse("hub").describe(task, rows)
    assert (settings["path"], settings["revision"]) == ("easy-vqa", "1.0")


def test_hub_data_are_described_by_the_commit_they_came_from(monkeypatch):
    asked = []
    sha = "0123456789abcdef0123456789abcdef01234567"

    def load_dataset(path, name, split, revision):
        asked.append((path, name, split, revision))
        rows = datasets.Dataset.from_list(pope_rows())
        rows.info.download_checksums = {f"hf://datasets/{path}@{sha}/data/test.parquet": {}}
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source.parse("hub", split="dev", dataset="lmms-lab-encoder/POPE", revision="v2")
    settings = source.describe(POPE, source.load(POPE, "paper"))
    assert asked == [("lmms-lab-encoder/POPE", None, "dev", "v2")]
    assert settings == {
        "source": "hub-dev",
        "path": "lmms-lab-encoder/POPE",
        "name": None,
        "split": "dev",
        "revision": sha,
    }


def test_a_folder_is_described_by_its_files(tmp_path):
    write_parquet(pope_rows(), tmp_path / "pope.parquet")
    source = folder(tmp_path)
    assert source.describe(POPE, source.load(POPE, "paper"))["files"] == ["pope.parquet"]
