"""The whole command: answers, scores, files, resume, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from harness_world import mme_rows, png, pope_rows, unexplained, write_parquet

from harness import run
from harness.data.images import UnreadableImage, decode
from harness.models.base import Picture
from harness.models.resumable import cut
from harness.models.vlmamba import VLMambaModel
from harness.run import main
from harness.runs import store
from harness.runs.schema import without_timing
from harness.scoring import judge as judging
from vlmamba.checkpoints import BUNDLED, NAMES
from vlmamba.generation import GroupedGenerator
from vlmamba_core.folder import RunFolder


@pytest.fixture
def world(tmp_path, model, processor) -> dict[str, str]:
    """A saved tiny model and two small benchmarks; paths as text.

    Its memory is long (A near 0), so that answers differ by question and by image.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            torch.nn.init.constant_(parameter, -6)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    write_parquet(pope_rows(), data / "pope.parquet")
    write_parquet(mme_rows(), data / "mme.parquet")
    return {"model": str(tmp_path / "model"), "data": str(data), "out": str(tmp_path / "out")}


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    """Random weights never end an answer; cap all lengths to keep the tests short."""
    generate = GroupedGenerator.generate

    def short(self, requests, max_new_tokens, *args, **kwargs):
        return generate(self, requests, min(max_new_tokens, 4), *args, **kwargs)

    monkeypatch.setattr(GroupedGenerator, "generate", short)


def command(world: dict[str, str], *extra: str, tasks: str = "pope,mme") -> list[str]:
    options = ["--tasks", tasks, "--batch-size", "4", "--backend", "torch"]
    for name, value in world.items():
        options += [f"--{name}", value]
    return [*options, *extra]


def read(world: dict[str, str], name: str) -> str:
    return (Path(world["out"]) / name).read_text(encoding="utf-8")


def lines(world: dict[str, str], task: str) -> list[dict]:
    return [json.loads(line) for line in read(world, f"samples_{task}.jsonl").splitlines()]


def test_run_writes_record_samples_and_table(world, capsys):
    assert main(command(world)) == 0
    record = json.loads(read(world, "record.json"))
    assert record["lmms_eval_check"] == {"pope": "equal", "mme": "equal"}
    assert record["tasks"]["pope"]["n"] == 24
    assert record["tasks"]["mme"]["n"] == 8
    assert record["protocol"] == "paper"
    assert record["label"] is None  # not the demo's data
    assert record["settings"]["backend"] == "torch"
    assert record["settings"]["dtype"] == "torch.float32"
    assert record["settings"]["packages"]["lmms-eval"]
    samples = lines(world, "pope")
    assert [sample["doc_id"] for sample in samples] == list(range(24))
    keys = {"doc_id", "question", "prediction", "parsed", "reference", "score", "image", "excluded"}
    assert samples[0].keys() == keys
    assert len({sample["image"] for sample in samples}) == 4
    assert record["timing"]["images"] == 4 + 2  # one prefill for an image's questions
    shown = capsys.readouterr().out
    assert "protocol paper" in shown
    assert "mme by part" in shown
    assert "absent from the answered rows: count" in shown
    assert "| pope | f1 |" in read(world, "table.md")
    assert unexplained(Path(world["out"])) == []


def test_every_row_gets_the_answer_it_would_get_alone(world):
    main(command(world))
    together = [sample["prediction"] for sample in lines(world, "pope")]
    assert len(set(together)) > 2  # more answers than questions
    main(command({**world, "out": world["out"] + "1"}, "--batch-size", "1"))
    assert together == [s["prediction"] for s in lines({"out": world["out"] + "1"}, "pope")]


def test_same_command_goes_on_where_it_was_stopped(world, monkeypatch):
    main(command({**world, "out": world["out"] + "-whole"}))
    asked: list[int] = []
    generate = GroupedGenerator.generate

    def stop_midway(self, requests, max_new_tokens, batch_size, on_done):
        asked.append(len(requests))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(self, requests, max_new_tokens, batch_size, on_done)

    with monkeypatch.context() as patched:
        patched.setattr(GroupedGenerator, "generate", stop_midway)
        assert main(command(world)) == 130
    assert not (Path(world["out"]) / "record.json").exists()
    assert main(command(world)) == 0
    record = json.loads(read(world, "record.json"))
    assert record["timing"]["resumed_answers"] == asked[0]
    assert record["timing"]["questions"] == 32 - asked[0]
    for task in ("pope", "mme"):
        assert lines(world, task) == lines({"out": world["out"] + "-whole"}, task)


def test_finished_run_is_not_repeated_unless_its_terms_change(world, monkeypatch):
    main(command(world))
    monkeypatch.setattr(GroupedGenerator, "generate", lambda *_: pytest.fail("asked again"))
    assert main(command(world)) == 0
    assert main(["--from-record", f"{world['out']}/record.json", "--out", world["out"]]) == 0
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        main(command(world, "--protocol", "lmms", "--overwrite"))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        main(command(world, "--blind", "--overwrite"))


@pytest.mark.parametrize(
    ("extra", "tasks", "differs"),
    [
        (("--limit", "3"), "pope,mme", "its limit is absent"),
        ((), "pope", "its tasks are pope, mme"),
        (("--protocol", "lmms"), "pope,mme", "its protocol is paper"),
        (("--blind",), "pope,mme", "its blind is False"),
        (("--model", "demo"), "pope,mme", "its model is /"),
    ],
)
def test_another_finished_run_is_not_replaced(world, capsys, extra, tasks, differs):
    main(command(world))
    before = {file.name: file.read_bytes() for file in Path(world["out"]).iterdir()}
    capsys.readouterr()
    assert main(command(world, *extra, tasks=tasks)) == 2
    error = capsys.readouterr().err
    assert "holds another finished run (32 answers scored): " + differs in error
    assert "give another --out, or --overwrite to replace it" in error
    assert before == {file.name: file.read_bytes() for file in Path(world["out"]).iterdir()}


def test_overwrite_leaves_nothing_of_the_run_before(world):
    main(command(world))
    assert main(command(world, "--limit", "3", "--overwrite", tasks="pope")) == 0
    assert list(json.loads(read(world, "record.json"))["tasks"]) == ["pope"]
    assert len(lines(world, "pope")) == 3
    assert not (Path(world["out"]) / "samples_mme.jsonl").exists()


def test_overwrite_leaves_neither_votes_nor_a_servers_file(world):
    main(command(world, "--votes", "2", "--temperature", "1", tasks="pope"))
    folder = Path(world["out"])
    (folder / "vqav2_submission.json").write_text("[]")
    assert (folder / "votes_pope.jsonl").exists()
    assert main(command(world, "--overwrite", tasks="pope")) == 0
    left = {path.name for path in folder.iterdir()}
    assert left == {
        *("README.md", "record.json", "table.md"),
        *("samples_pope.jsonl", "answers.rank0.jsonl"),
    }


def test_a_finished_runs_journal_answers_for_the_next_one(world):
    """More questions, then another task: only the new ones are asked. README.md says so."""

    def asked(*more: str, tasks: str) -> tuple[int, int]:
        assert main(command(world, "--overwrite", *more, tasks=tasks)) == 0
        timing = json.loads(read(world, "record.json"))["timing"]
        return timing["questions"], timing["resumed_answers"]

    assert asked("--limit", "10", tasks="pope") == (10, 0)
    assert asked(tasks="pope") == (14, 10)
    assert asked(tasks="pope,mme") == (8, 24)
    assert asked(tasks="pope,mme") == (0, 32)
    (Path(world["out"]) / "answers.rank0.jsonl").unlink()  # as README.md allows
    assert main(["--from-record", f"{world['out']}/record.json", "--out", world["out"]]) == 0
    assert asked(tasks="pope,mme") == (0, 32)


def test_how_answers_are_made_may_change(world):
    main(command(world, tasks="pope"))
    assert main(command(world, "--batch-size", "2", tasks="pope")) == 0


def test_other_weights_under_the_same_name_are_another_run(world, model, processor, capsys):
    main(command(world, tasks="pope"))
    torch.nn.init.constant_(next(model.parameters()), 0.5)
    model.save_pretrained(world["model"])
    assert main(command(world, tasks="pope")) == 2
    assert "holds a finished run of other weights of this name" in capsys.readouterr().err
    assert main(command(world, "--overwrite", tasks="pope")) == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"made by": "somebody"}'])
def test_a_foreign_record_is_left_alone(world, text, capsys):
    Path(world["out"]).mkdir()
    (Path(world["out"]) / "record.json").write_text(text)
    assert main(command(world, tasks="pope")) == 2
    assert "is there and is not a run's record" in capsys.readouterr().err
    assert read(world, "record.json") == text


def test_the_same_command_gives_the_same_files_byte_for_byte(world):
    folders = [Path(world["out"] + name) for name in ("-1", "-2")]
    for folder in folders:
        assert main(command({**world, "out": str(folder)})) == 0
    for name in ("samples_pope.jsonl", "samples_mme.jsonl", "table.md"):
        assert folders[0].joinpath(name).read_bytes() == folders[1].joinpath(name).read_bytes()
    first, second = (
        without_timing(json.loads((folder / "record.json").read_text())) for folder in folders
    )
    assert first == second


def test_a_rerun_from_a_record_warns_of_each_difference(world, capsys):
    assert main(command(world, "--limit", "2", tasks="pope")) == 0
    again = ["--from-record", f"{world['out']}/record.json", "--out", f"{world['out']}-again"]
    capsys.readouterr()
    assert main(again) == 0
    assert "warning" not in capsys.readouterr().err
    assert lines(world, "pope") == lines({"out": f"{world['out']}-again"}, "pope")

    path = Path(world["out"]) / "record.json"
    record = json.loads(path.read_text())
    installed = record["settings"]["packages"].pop("torch")
    record["settings"]["packages"]["torch"] = "1.0"
    record["settings"]["packages"]["mamba-ssm"] = "2.2"
    record["model"]["sha256"] = "0" * 64
    record["data"]["pope"]["rows_digest"] = "other"
    path.write_text(json.dumps(record))
    again[-1] = world["out"]  # over the record itself
    assert main(again) == 0
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: not as")]
    told = [line.removeprefix("warning: not as in the record: ") for line in warnings]
    assert told[0].startswith("model.sha256 was 000000")
    assert told[1] == f"settings.packages.torch was 1.0, here it is {installed}"
    assert told[2] == "settings.packages.mamba-ssm was 2.2, here it is absent"
    assert told[3].startswith("data.pope.rows_digest was other, here it is ")
    assert len(told) == 4


def test_the_record_names_the_bundled_model_and_not_where_it_lies(world):
    assert main(command({**world, "model": "nano"}, "--limit", "1", tasks="pope")) == 0
    assert json.loads(read(world, "record.json"))["model"]["config"]["_name_or_path"] == "nano"
    assert str(BUNDLED["nano"].parent) not in read(world, "record.json")


def test_broken_images_are_counted_and_the_run_goes_on(world, capsys):
    rows = pope_rows()
    rows[2]["image"] = {"bytes": png((7, 7, 7))[:40], "path": "half.png"}
    rows[9]["image"] = {"bytes": b"", "path": "empty.png"}
    write_parquet(rows, Path(world["data"]) / "pope.parquet")
    assert main(command(world)) == 0
    record = json.loads(read(world, "record.json"))
    assert record["tasks"]["pope"]["excluded"] == {"unreadable image": 2}
    assert record["tasks"]["pope"]["n"] == 22
    assert record["lmms_eval_check"]["pope"] == "equal"
    sample = lines(world, "pope")[2]
    assert (sample["prediction"], sample["score"]) == (None, None)
    assert sample["excluded"] == "unreadable image"
    printed = capsys.readouterr()
    assert "2 left out: unreadable image" in printed.out
    assert "row 3" in printed.err


def test_half_a_pair_is_left_out_with_its_unreadable_twin(world):
    rows = mme_rows()
    rows[0]["image"] = {"bytes": b"broken", "path": None}
    write_parquet(rows, Path(world["data"]) / "mme.parquet")
    main(command(world, tasks="mme"))
    assert json.loads(read(world, "record.json"))["tasks"]["mme"]["n"] == 6
    assert "MME needs 2" in lines(world, "mme")[1]["excluded"]


def test_blind_answers_do_not_depend_on_the_image(world):
    main(command(world, "--blind"))
    answers: dict[str, set[str]] = {}
    for sample in lines(world, "pope"):
        answers.setdefault(sample["question"], set()).add(sample["prediction"])
    assert all(len(given) == 1 for given in answers.values())
    assert json.loads(read(world, "record.json"))["arguments"]["blind"] is True


def test_blind_features_are_the_mean_over_distinct_images(world):
    model = VLMambaModel(world["model"], batch_size=2, device="cpu", blind=True)
    images = [decode(row["image"]).convert("RGB") for row in pope_rows(images=3, questions=1)[:3]]
    pictures = [Picture(f"image_{i}", lambda image=image: image) for i, image in enumerate(images)]

    def broken():
        raise UnreadableImage("cut")

    assert model.begin_task("t", [*pictures, Picture("broken", broken)], 2) is not None
    pixels = model.processor.pixel_values(images)
    with torch.inference_mode():
        expected = model.model.encode_images(pixels).mean(0, keepdim=True)
    torch.testing.assert_close(model._stand_in, expected)


def test_limit_takes_the_first_rows_and_says_so(world, capsys):
    assert main(command(world, "--limit", "3", tasks="pope")) == 0
    assert len(lines(world, "pope")) == 3
    assert "first 3 questions only" in capsys.readouterr().out


def test_out_of_memory_halves_the_batch_and_is_recorded(world, monkeypatch):
    main(command({**world, "out": world["out"] + "-calm"}))
    generate = GroupedGenerator.generate

    def small_memory(self, requests, max_new_tokens, batch_size, on_done):
        def fail_after_one(index: int, text: str) -> None:
            on_done(index, text)
            if batch_size > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return generate(self, requests, max_new_tokens, batch_size, fail_after_one)

    monkeypatch.setattr(GroupedGenerator, "generate", small_memory)
    assert main(command(world)) == 0
    assert "batch size halved to 2" in json.loads(read(world, "record.json"))["events"][0]
    assert lines(world, "pope") == lines({"out": world["out"] + "-calm"}, "pope")


def test_stops_cut_the_answer():
    assert cut(" yes\n\nand more", ("\n\n",)) == "yes"
    assert cut("no stop ", ()) == "no stop"


def test_question_cannot_bring_image_tokens(world):
    rows = [{**row, "question": "Is <image> this <image> it?"} for row in pope_rows(images=1)]
    write_parquet(rows, Path(world["data"]) / "pope.parquet")
    assert main(command(world, tasks="pope")) == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tasks", "popr"], "unknown task 'popr'; known, nearest first: pope"),
        (["--tasks", ","], "--tasks is ','"),
        (["--data", "/no/where"], "no data folder '/no/where'"),
        (["--style", "seen"], "--style seen needs --data demo"),
        (["--protocol", "papr"], "unknown protocol 'papr'; known, nearest first: paper"),
        (["--backend", "gpu"], "unknown backend 'gpu'"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--limit", "0"], "--limit is 0; expected at least 1"),
        (["--batch-size", "-1"], "--batch-size is -1"),
        (["--limit", "ten"], "invalid int value: 'ten'"),
        (["--seed", "-1"], "--seed is -1"),
        (["--what"], "unrecognized arguments: --what"),
        (["--from-record", "/no/record.json"], "is not a record.json"),
        (["--model", "nanoo"], "unknown model 'nanoo'; known, nearest first: nano"),
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--backend", "cuda"], "cannot run on"),
        (["--device", "cuda", "--dtype", "float32"], "no usable GPU"),
    ],
)
def test_mistakes_are_one_line_and_code_2(world, capsys, monkeypatch, extra, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command(world, *extra)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]


def test_no_tasks_at_all_lists_them(capsys):
    assert main([]) == 2
    assert "--tasks is missing; give some of coco_cap, easy_vqa" in capsys.readouterr().err


def test_pickled_checkpoint_is_refused(world, capsys):
    folder = Path(world["model"])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert main(command(world)) == 2
    assert "pytorch_model.bin is a pickled checkpoint" in capsys.readouterr().err


def captions_without_truth(world: dict[str, str]) -> list[dict]:
    rows = [
        {"question_id": f"COCO_test2014_{i:012}.jpg", "answer": None, "image": row["image"]}
        for i, row in enumerate(pope_rows(images=2, questions=1))
    ]
    rows[1]["image"] = {"bytes": b"broken", "path": None}
    write_parquet(rows, Path(world["data"]) / "coco_cap.parquet")
    return rows


def test_hidden_truth_leaves_the_test_servers_file(world, capsys):
    rows = captions_without_truth(world)
    assert main(command(world, tasks="pope,coco_cap")) == 0
    sent = json.loads(read(world, "coco_cap_submission.json"))
    assert [entry["image_id"] for entry in sent] == list(range(len(rows)))
    assert sent[1]["caption"] == ""
    assert sent[0]["caption"]
    table = read(world, "table.md")
    assert "coco_cap: no score is made here; for the test server: 6 answers in" in table
    assert "1 answers in it are empty: unreadable image" in table
    assert not (Path(world["out"]) / "pope_submission.json").exists()


def test_submission_folder(world, tmp_path, capsys):
    captions_without_truth(world)
    assert main(command(world, "--submit", str(tmp_path / "sent"), tasks="coco_cap,pope")) == 0
    assert [file.name for file in (tmp_path / "sent").iterdir()] == ["coco_cap_submission.json"]
    assert main(command(world, "--submit", str(tmp_path / "sent"), tasks="pope")) == 2
    assert "no chosen task has a test server; these do: coco_cap" in capsys.readouterr().err


def vqav2_test_splits(world: dict[str, str]) -> None:
    """Four questions of test, two of them testdev's, without truth, as the hub has them."""
    root = Path(world["data"]) / "VQAv2" / "data"
    root.mkdir(parents=True)
    rows = [
        {"question": "What?", "answers": None, "answer_type": None, "image_id": i, "question_id": i}
        | {"image": row["image"]}
        for i, row in enumerate(pope_rows(images=4, questions=1)[:4])
    ]
    write_parquet(rows, root / "test-00000-of-00001.parquet")
    write_parquet([rows[3], rows[1]], root / "testdev-00000-of-00001.parquet")


def test_vqav2s_server_gets_every_question_of_test(world, tmp_path, capsys):
    vqav2_test_splits(world)
    options = ("--split", "testdev", "--submit", str(tmp_path / "sent"))
    assert main(command(world, *options, tasks="vqav2")) == 0
    file = tmp_path / "sent" / "vqav2_submission.json"
    sent = {entry["question_id"]: entry["answer"] for entry in json.loads(file.read_text())}
    assert [bool(sent[number]) for number in range(4)] == [False, True, False, True]
    assert "for the test server: 4 answers in" in read(world, "table.md")
    capsys.readouterr()
    assert main(command(world, *options, "--limit", "1", "--overwrite", tasks="vqav2")) == 0
    printed = capsys.readouterr()
    assert "--limit 1 leaves 1 of 2 questions empty" in printed.err
    assert "1 answers in it are empty and count as wrong: not asked (first question_id: 1)" in (
        printed.out
    )
    sent = {entry["question_id"]: entry["answer"] for entry in json.loads(file.read_text())}
    assert [bool(sent[number]) for number in range(4)] == [False, False, False, True]


def test_a_submission_that_cannot_be_made_is_refused_before_the_model(world, capsys):
    rows = [row | {"question_id": 7} for row in captions_without_truth(world)]
    write_parquet(rows, Path(world["data"]) / "coco_cap.parquet")
    options = ("--submit", world["out"], "--model", "no/model")
    assert main(command(world, *options, tasks="coco_cap")) == 2
    assert "rows 1 and 2 have one question_id, 7" in capsys.readouterr().err


def test_a_judge_grades_in_a_run(world, monkeypatch):
    rows = [
        {
            "question_id": f"v1_{i}",
            "question": "Who?",
            "answer": "a dog",
            "capability": "rec",
            "image": row["image"],
        }
        for i, row in enumerate(pope_rows(images=2, questions=1))
    ]
    write_parquet(rows, Path(world["data"]) / "mmvet.parquet")
    monkeypatch.setattr(judging.Judge, "ask", lambda self, prompt, **_: "0.5")
    judge = ("--judge", "http://localhost:1/v1", "--judge-model", "fake")
    assert main(command(world, *judge, tasks="mmvet,mme")) == 0
    record = json.loads(read(world, "record.json"))
    assert record["tasks"]["mmvet"]["metrics"]["score"]["value"] == 0.5
    assert record["tasks"]["mmvet"]["notes"] == ["graded by fake"]
    assert record["arguments"]["judge_model"] == "fake"
    assert record["lmms_eval_check"] == {"mmvet": "not made: a judge helped", "mme": "equal"}
    assert main(command(world, *judge, tasks="mme")) == 2


def test_gqas_two_tables_run(world):
    root = Path(world["data"]) / "GQA"
    names = ("testdev_balanced_instructions", "testdev_balanced_images")
    for name in names:
        (root / name).mkdir(parents=True)
    images = [{"id": str(i), "image": row["image"]} for i, row in enumerate(pope_rows()[:8:2])]
    questions = [{"question": "Who?", "answer": "dog", "imageId": str(i % 4)} for i in range(8)]
    tables = [datasets.Dataset.from_list(questions), datasets.Dataset.from_list(images)]
    for name, table in zip(names, tables, strict=True):
        table.to_parquet(root / name / "testdev-00000-of-00001.parquet")
    assert main(command(world, tasks="gqa")) == 0
    samples = lines(world, "gqa")
    assert len({sample["image"] for sample in samples}) == 4
    assert json.loads(read(world, "record.json"))["timing"]["images"] == 4


def test_unknown_model_is_refused_before_torch_is_loaded():
    assert set(run.BUNDLED_MODELS) == set(NAMES)
    code = (
        "import sys; from harness.run import main; "
        "sys.exit(10 * main(['--tasks', 'pope', '--model', 'nanoo']) + ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 20
    assert "unknown model 'nanoo'; known, nearest first: nano" in done.stderr


def test_data_id_is_for_one_task(capsys):
    assert main(["--tasks", "pope,mme", "--data", "hub", "--data-id", "a/b"]) == 2
    assert "--data-id a/b is one data set; give one task" in capsys.readouterr().err


def test_prompt_options_are_named_in_record_and_tables(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--tasks", "textvqa,pope", "--limit", "2", "--ocr", "first", "--out", str(out)]
    assert run.main(arguments) == 0
    record = json.loads((out / "record.json").read_text())
    assert record["arguments"]["ocr"] == "first"
    assert record["prompts"] == {"textvqa": {"ocr": "first"}, "pope": {}}
    assert "textvqa (ocr first)" in capsys.readouterr().out
    lines = (out / "samples_textvqa.jsonl").read_text().splitlines()
    assert all(json.loads(line)["question"].startswith("Reference OCR token") for line in lines)
    rows = {row.task: row.marks for row in store.EvaluationRun.read(out).results()}
    assert rows == {"textvqa": ("ocr first",), "pope": ()}
    assert run.main(["--tasks", "pope", "--ocr", "none", "--out", str(tmp_path / "x")]) == 2
    assert "--ocr is for textvqa" in capsys.readouterr().err


def test_what_another_process_has_finished_meanwhile_is_not_replaced(tmp_path, monkeypatch, capsys):
    """Between looking for a record and holding the folder's lock."""
    other = Path(__file__).parents[1] / "results" / "runs" / "demo" / "record.json"

    def late(path: Path, **options) -> RunFolder:
        path.mkdir()
        (path / "record.json").write_bytes(other.read_bytes())
        return RunFolder(path, **options)

    monkeypatch.setattr(run, "RunFolder", late)
    arguments = ["--tasks", "pope", "--limit", "3", "--out", str(tmp_path / "out")]
    assert run.main(arguments) == 2
    assert "holds another" in capsys.readouterr().err
    assert (tmp_path / "out" / "record.json").read_bytes() == other.read_bytes()
