"""A checkpoint's card: what it is, how it was trained, and scores as a hub reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_vlms
import yaml
from harness_world import mme_rows, pope_rows, write_parquet
from huggingface_hub import ModelCard

from harness import run
from vlmamba import VLMambaForConditionalGeneration, model_card
from vlmamba_core.errors import UserError


def test_a_card_is_written_once_and_the_users_own_is_kept(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "import vlmamba" in card
    assert f"| connector | {model.config.connector} |" in card
    (tmp_path / "a" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b" / "README.md").exists()


def test_a_card_says_how_the_weights_were_trained(model, tmp_path):
    """Data by name and digest, without its folder; nothing from a command line breaks the table."""
    run = {
        "stage": "finetune",
        "init": "/home/somebody/pretrain/final",
        "preset": "nano+vss_l2",
        "data": ["/home/somebody/a|b.json"],
        "data_digests": ["0123456789abcdef0123"],
        "hyperparameters": {"lr": 2e-5, "lora": None, "schedule": "cosine"},
        "packages": {"torch": "2.15"},
    }
    model_card.write_card(tmp_path, model.config, run)
    card = (tmp_path / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vl-mamba", "mamba"],
    }
    for line in (
        "| stage | finetune |",
        "| started from | final |",
        r"| data | a\|b.json |",
        "| BLAKE2b of the data, first 16 digits | 0123456789abcdef |",
        "| lr | 2e-05 |",
        "| packages: torch | 2.15 |",
    ):
        assert line in text.splitlines()
    assert "somebody" not in card and "| lora |" not in card
    assert "## Scores" in text


def test_a_card_names_folders_without_where_they_are(model, tmp_path):
    """Hub ids, names and what lies beside a path stay as they are."""
    model.config.language_model_id = "/home/somebody/language model@main"
    model.config.vision_model_id = "org/encoder,/home/somebody/other"
    run = {
        "stage": "finetune",
        "init": "/home/somebody/pretrain/final/",
        "preset": "hf:/home/somebody/pythia@main+clip-l-336+mlp",
        "recipe": "/home/somebody/recipes/mine.toml",
        "hyperparameters": {"teacher": "/home/somebody/teacher", "lora_targets": "in_proj,x_proj"},
    }
    model_card.write_card(tmp_path / "a", model.config, run)
    lines = (tmp_path / "a" / "README.md").read_text().splitlines()
    assert "somebody" not in "".join(lines)
    for line in (
        "| language model | language model@main |",
        "| vision encoder | org/encoder,other |",
        "| started from | final |",
        "| preset | hf:pythia@main+clip-l-336+mlp |",
        "| recipe | mine.toml |",
        "| teacher | teacher |",
        "| lora_targets | in_proj,x_proj |",
    ):
        assert line in lines
    hub = {"init": "org/start", "preset": "hf:org/name@main+mlp", "recipe": "llava-1.5"}
    model_card.write_card(tmp_path / "b", model.config, hub)
    text = (tmp_path / "b" / "README.md").read_text()
    assert "| org/start |" in text and "| hf:org/name@main+mlp |" in text
    assert "| llava-1.5 |" in text


def test_a_card_goes_along_from_folder_to_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    loaded = VLMambaForConditionalGeneration.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == "mine"


@pytest.fixture
def folder(model, processor, tmp_path) -> Path:
    """A saved model; beside it data/ with questions of two benchmarks."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    write_parquet(pope_rows(images=2), tmp_path / "data" / "pope.parquet")
    write_parquet(mme_rows(), tmp_path / "data" / "mme.parquet")
    return tmp_path / "model"


def measured(folder: Path, out: str, *more: str, model: str | None = None) -> dict:
    """The record of a run that updates the card."""
    place = folder.parent / out
    arguments = ["--model", model or str(folder), "--data", str(folder.parent / "data")]
    arguments += ["--update-card", "--out", str(place), *more]
    assert run.main(arguments) == 0
    return json.loads((place / "record.json").read_text())


def test_scores_are_in_the_metadata_and_in_the_text(folder, capsys):
    before = (folder / "README.md").read_text()
    record = measured(folder, "out", "--tasks", "pope,mme")
    assert f"scores added to {folder / 'README.md'}" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.text.startswith(before.split("---\n", 2)[2].rstrip())
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.model_name == "VL-Mamba"
    found = {(r.dataset_type, r.metric_type): r for r in card.data.eval_results}
    told = {
        (f"{task}-{record['data'][task]['source']}", metric): (entry, value)
        for task, entry in record["tasks"].items()
        for metric, value in entry["metrics"].items()
        if "/" not in metric
    }
    assert set(found) == set(told)
    for key, (entry, metric) in told.items():
        percent = entry["unit"] == "fraction"
        expected = metric["value"] * (100 if percent else 1)
        assert found[key].metric_value == pytest.approx(expected, abs=0.051)
        assert found[key].metric_args["n"] == metric.get("n", entry["n"])
        assert found[key].metric_args["weights"] == record["model"]["sha256"][:16]
        settings = "paper protocol, template vicuna_v1, float32"
        assert found[key].metric_name == f"{key[1]} ({settings})"
        assert f"| {found[key].dataset_name} | {found[key].metric_name} |" in card.text
    results = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["model-index"]
    assert [len(one["metrics"]) for one in results[0]["results"]] == [5, 1]


def test_scores_of_equal_settings_are_replaced_and_others_stay(folder):
    measured(folder, "a", "--tasks", "pope")
    once = (folder / "README.md").read_text()
    measured(folder, "a", "--tasks", "pope")
    assert (folder / "README.md").read_text() == once
    (folder / "README.md").write_text(f"{once}\n## Mine\n\nmy words\n")
    measured(folder, "b", "--tasks", "pope", "--limit", "4", "--protocol", "lmms")
    card = ModelCard.load(folder / "README.md")
    names = [result.metric_name for result in card.data.eval_results]
    assert len(names) == len(set(names)) == 10
    settings = "lmms protocol, template vicuna_v1, float32, first 4 questions"
    assert f"accuracy ({settings})" in names
    assert card.text.endswith("\n## Mine\n\nmy words\n")
    measured(folder, "c", "--tasks", "pope", "--dtype", "bf16")  # the same weights, rounded
    assert len(ModelCard.load(folder / "README.md").data.eval_results) == 15


def test_scores_of_other_weights_go(folder, model):
    measured(folder, "a", "--tasks", "pope")
    by_hand = ModelCard.load(folder / "README.md")
    by_hand.data.eval_results[0].metric_args = None
    by_hand.data.eval_results[0].metric_name = "mine"
    by_hand.save(folder / "README.md")
    model.get_input_embeddings().weight.data *= 2
    model.save_pretrained(folder)
    record = measured(folder, "b", "--tasks", "mme")
    found = ModelCard.load(folder / "README.md").data.eval_results
    assert found[0].metric_name == "mine"  # what somebody else wrote is theirs
    assert {r.dataset_type for r in found[1:]} == {f"mme-{record['data']['mme']['source']}"}


def test_a_model_of_the_library_gets_a_card_too(folder):
    llava = tiny_vlms.save("llava", folder.parent / "llava")
    measured(folder, "out", "--tasks", "pope", "--limit", "2", model=f"hf:{llava}")
    card = ModelCard.load(llava / "README.md")
    assert card.data.model_name == "llava" and len(card.data.eval_results) == 5


@pytest.mark.parametrize("name", ["nano", "api:http://127.0.0.1:9/v1,model=m", "org/name"])
def test_a_model_without_a_folder_has_no_card(name, capsys):
    assert run.main(["--tasks", "pope", "--model", name, "--update-card"]) == 2
    assert "--update-card writes into the model's own folder" in capsys.readouterr().err


@pytest.mark.parametrize("front", ["- a list", "model-index: 3", "a: [", "model-index: [{}]"])
def test_a_card_that_cannot_be_read_is_refused_before_the_run(front, folder, capsys):
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Mine\n")
    arguments = ["--tasks", "pope", "--model", str(folder), "--update-card"]
    assert run.main([*arguments, "--out", str(folder.parent / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "its metadata cannot be read" in printed
    assert not (folder.parent / "out").exists()


def test_a_record_without_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match="no score"):
        model_card.add_scores(tmp_path, {"tasks": {"mmvet": {"metrics": {}}}})
    assert not list(tmp_path.iterdir())
