"""`vlmamba.ask`: what it prints equals the model's own answers; mistakes are one line."""

from __future__ import annotations

import importlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

import harness
import harness.__main__ as harness_commands
import vlmamba
import vlmamba.__main__ as model_commands
from vlmamba import ask, checkpoints
from vlmamba_core import __version__

QUESTIONS = ("Is there a dog in the image?", "Describe the image.")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("asked") / "a.png"
    Image.effect_noise((120, 80), 60).convert("RGB").save(path)
    return path


def answers(picture, *rounds: str) -> list[str]:
    """What the model says to the last of some rounds, by its grouped generator's template."""
    model, processor = checkpoints.load("nano")
    messages, found = [], []
    for number, question in enumerate(rounds):
        content = [{"type": "text", "text": question}]
        content = [{"type": "image"}, *content] if number == 0 else content
        messages.append({"role": "user", "content": content})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=[Image.open(picture)], return_tensors="pt")
        made = model.eval().generate(**inputs, max_new_tokens=16, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
        messages.append({"role": "assistant", "content": found[-1]})
    return found


def test_one_question(picture, capsys):
    command = [str(picture), QUESTIONS[0], "--max-new-tokens", "16", "--stats"]
    assert ask.main(command) == 0
    out, err = capsys.readouterr()
    assert out == answers(picture, QUESTIONS[0])[0] + "\n"
    assert "tokens/s" in err and "KiB at every length" in err


def test_a_question_may_be_longer_than_a_name_of_a_file(picture):
    question = "Which of these is in the image? " * 20
    assert ask.pictures_and_question([str(picture), question]) == ([str(picture)], question)


@pytest.mark.parametrize("chat", [True, False])
def test_questions_from_the_standard_input(picture, chat, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(QUESTIONS)))
    assert ask.main([str(picture), "--max-new-tokens", "16", *(["--chat"] if chat else [])]) == 0
    alone = [answers(picture, question)[0] for question in QUESTIONS]
    expected = answers(picture, *QUESTIONS) if chat else alone
    assert capsys.readouterr().out.splitlines() == expected


def test_a_picture_from_the_standard_input(picture, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture.read_bytes())))
    assert ask.main(["-", QUESTIONS[0], "--max-new-tokens", "16"]) == 0
    assert capsys.readouterr().out == answers(picture, QUESTIONS[0])[0] + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", "What?"], "no picture 'nowhere.png'"),
        (["What?"], "no picture given, only 'What?'"),
        (["setup.py", "What?"], "setup.py is no picture that can be read"),
        (["-"], "give the question with it"),
        (["a.png", "What?", "--dtype", "int8"], "unknown dtype 'int8'; known, nearest first: auto"),
        (["a.png", "What?", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert ask.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("piped", [False, True])
def test_a_damaged_picture_is_not_shown(piped, picture, tmp_path, capsys, monkeypatch):
    """Pillow shows a PNG whose pixels do not fit their checksum."""
    data = bytearray(picture.read_bytes())
    data[data.rindex(b"IEND") - 5] ^= 1  # the checksum's last byte
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(data))))
    name = "-" if piped else str(damaged)
    assert ask.main([name, QUESTIONS[0], "--max-new-tokens", "2"]) == 2
    error = capsys.readouterr().err
    assert f"{name} is no picture that can be read" in error and error.count("\n") == 1


def test_gray_of_sixteen_bits_is_scaled(tmp_path):
    """Pillow's own conversion clips it to white."""
    levels = np.linspace(0, 65535, 64 * 48).astype(np.uint16).reshape(48, 64)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray((levels / 257).astype(np.uint8)).save(tmp_path / "plain.png")
    shown = [ask.read_picture(str(tmp_path / f"{name}.png")) for name in ("deep", "plain")]
    assert np.array_equal(*(np.asarray(one.convert("RGB")) for one in shown))


@pytest.mark.parametrize("commands", [model_commands, harness_commands])
def test_every_command_is_listed_and_says_its_version(commands, capsys):
    package = commands.__name__.partition(".")[0]
    assert commands.main([]) == 0
    listed = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"python -m {package}.{name} " in listed
    for name in commands.COMMANDS:
        command = importlib.import_module(f"{package}.{name}")
        if hasattr(command, "__path__"):  # a package, run by its __main__
            command = importlib.import_module(f"{package}.{name}.__main__")
        with pytest.raises(SystemExit) as left:
            command.main(["--version"])
        assert left.value.code in (0, None)
        assert capsys.readouterr().out == f"vlmamba-harness {__version__}\n"
    with pytest.raises(SystemExit):
        commands.main(["--version"])
    assert capsys.readouterr().out == f"vlmamba-harness {__version__}\n"
    assert harness.__version__ == vlmamba.__version__ == __version__
