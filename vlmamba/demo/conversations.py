"""Training data of the demo world in LLaVA's JSON format.

    python -m vlmamba.demo --out DIR --images 12000 --captions 8000

`pretrain.json` has one caption a picture (as LLaVA's 558k set), `finetune.json` conversations of
short answers (as its 665k mix): every prompt format of the benchmarks, the easy-VQA train split
and a few samples without a picture.  Pictures lie beside them in `images/` and `easy_vqa/`.
For the language model alone there are `text.txt`, a line a document: plain English
(`text.documents`) and lines about scenes told in words (`words.in_words`); `near.txt` and
`far.txt`, lines that ask what is in such scenes; `facts.txt`, lines with questions of every kind,
and `letters.txt`, mostly of those with lettered options; `recall-1.txt` to `recall-3.txt`, lines
that ask for signs, from a copy to the benchmark's question; `dialogue.json`, conversations about
told scenes.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import random
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vlmamba.demo import labeled as with_signs
from vlmamba.demo import questions as ask
from vlmamba.demo import words
from vlmamba.demo.labeled_talks import LEVELS, Talk, labeled_lines, labeled_talk, recall_lines
from vlmamba.demo.questions.base import SHORT_ANSWER
from vlmamba.demo.render import render
from vlmamba.demo.text import documents
from vlmamba.demo.vocabulary import TRAINING_STYLES, WORDS, with_article
from vlmamba.demo.words import in_words
from vlmamba.demo.world import Scene, SceneOptions, sample_scene
from vlmamba_core.errors import UserError
from vlmamba_core.folder import write_atomically
from vlmamba_core.tokens import IMAGE

# The published instruction sentences (LLaVA-1.5), which `tasks` uses as well.
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
CAPTION_REQUESTS = (
    CAPTION,
    "Describe the image concisely.",
    "Give a short description of the image.",
    "What is in the photo?",
)

# A small language model forgets a picture that lies hundreds of tokens back; benchmarks ask one
# question right behind it.
TURNS_PER_SAMPLE = 5
TURN_WEIGHTS = {  # kind of turn -> how often; the yes/no pairs of MME count one by one
    "existence": 10.0,
    "pair": 6.0,
    "open": 8.0,
    "choice": 6.0,
    "caption": 0.8,
}
SIGN_TURNS = ("textvqa", "read")  # besides, where there is a sign: only every third picture has one
OPEN_WEIGHTS = {"what kind": 2.0, "which one": 2.0, "how many": 2.0}  # the others: 1


@dataclass(frozen=True)
class _Job:
    """A picture to draw and the file it goes to."""

    scene: Scene
    path: Path


def build_training_data(
    out: Path,
    images: int = 12000,
    captions: int = 8000,
    dialogues: int = 20000,
    seed: int = 0,
    styles: Sequence[str] = TRAINING_STYLES,
    easy_vqa: bool = True,
    workers: int = 2,
    labeled: int = 0,
    patches: bool = False,
) -> None:
    """Write the training files and their pictures to the folder `out`.

    images, captions: pictures of `finetune.json` and `pretrain.json`; dialogues: scenes told in
    words in `dialogue.json`; the `.txt` files have more in proportion. labeled: conversations about
    things with signs (what `retrieval` asks) besides, at the end of `finetune.json`, as many told
    in words in `dialogue.json`, and lines in `facts.txt` and `recall-*.txt`. patches: with what
    each patch of a picture shows ("patch_words"). Equal arguments give equal files. Drawing spawns
    processes, so a script calls this under `if __name__ == "__main__"`. Raises UserError when `out`
    already holds a training set.
    """
    out = Path(out)
    if (out / "finetune.json").exists():
        raise UserError(f"{out} already holds a training set; give another --out or remove it")
    options = SceneOptions(styles=tuple(styles), variants=True)
    balance = ask.Existence()
    pretrain, finetune, jobs = [], [], []
    for index in range(captions):
        scene = sample_scene(f"train/{seed}/caption/{index}", options)
        jobs.append(_Job(scene, _picture_path(f"c{index:06d}")))
        pretrain.append(caption_sample(scene, jobs[-1].path))
    for index in range(images):
        scene = sample_scene(f"train/{seed}/talk/{index}", options)
        jobs.append(_Job(scene, _picture_path(f"t{index:06d}")))
        finetune += conversation_samples(scene, jobs[-1].path, balance)
    finetune += [text_sample(f"train/{seed}/text/{index}") for index in range(images // 30)]
    for sample, pictures in labeled_samples(f"train/{seed}/labeled", labeled, styles):
        finetune.append(sample)
        jobs += pictures
    if patches:
        _add_patch_words([*pretrain, *finetune], jobs)
    _draw(jobs, out, workers)
    if easy_vqa:
        finetune += easy_vqa_samples(out, seed)
    lines = told_lines(f"train/{seed}/told", 3 * dialogues)
    asked = 3 * dialogues // 2
    _write_lines(out / "text.txt", itertools.chain(documents(), lines))
    _write_lines(out / "near.txt", question_lines(f"train/{seed}/bridge", asked, far=False))
    _write_lines(out / "far.txt", question_lines(f"train/{seed}/bridge2", asked, far=True))
    signs = labeled_lines(f"train/{seed}/labeled-facts", labeled)
    facts = fact_lines(f"train/{seed}/facts", asked, FACTS)
    _write_lines(out / "facts.txt", itertools.chain(facts, signs))
    _write_lines(out / "letters.txt", fact_lines(f"train/{seed}/letters", asked, LETTERS))
    for number, level in enumerate(LEVELS if labeled else (), 1):
        lines = recall_lines(f"train/{seed}/recall/{number}", 3 * labeled, level)
        _write_lines(out / f"recall-{number}.txt", lines)
    told = told_samples(f"train/{seed}/dialogue", dialogues)
    told += told_labeled_samples(f"train/{seed}/labeled-dialogue", labeled)
    _write_json(out / "dialogue.json", told)
    _write_json(out / "pretrain.json", pretrain)
    _write_json(out / "finetune.json", finetune)


def _add_patch_words(samples: Iterable[dict], jobs: Iterable[_Job]) -> None:
    """Say of every drawn picture what its patches show (`vlmamba.data.patch_words`)."""
    shown = {job.path.as_posix(): job.scene for job in jobs}
    for sample in samples:
        image = sample.get("image")
        if image is None:
            continue
        scenes = [shown[path] for path in ([image] if isinstance(image, str) else image)]
        grids = [(with_signs if s.labels else words).patch_words(s) for s in scenes]
        sample["patch_words"] = grids[0] if isinstance(image, str) else grids


def _picture_path(name: str) -> Path:
    return Path("images") / name[:-3] / f"{name}.jpg"


def caption_sample(scene: Scene, image: Path) -> dict:
    """One caption turn, as in LLaVA's pretraining set."""
    rng = random.Random(f"{scene.seed}/words")
    request, sentence = rng.choice(CAPTION_REQUESTS), rng.choice(ask.captions(scene, rng, 5))
    return _sample(image.stem, [(request, sentence)], image)


def conversation_samples(scene: Scene, image: Path, balance: ask.Existence) -> list[dict]:
    """9 to 13 turns of mixed kinds about one picture, a caption among them, cut into short samples;
    no turn gives away the answer of a later question about existence."""
    rng = random.Random(f"{scene.seed}/words")
    kinds = rng.choices(list(TURN_WEIGHTS), list(TURN_WEIGHTS.values()), k=rng.randint(10, 18))
    if scene.sign:
        kinds += SIGN_TURNS
        rng.shuffle(kinds)
    if rng.random() < 0.5:
        kinds.sort(key=lambda kind: kind != "existence")  # asked before anything is given away
    turns: list[tuple[str, str]] = []
    mentioned: set[str] = set()
    for kind in kinds:
        turn = _turn(kind, scene, rng, balance, mentioned)
        if turn and turn[0] not in (said for said, _ in turns):
            turns.append(turn)
    if not any(text == CAPTION for text, _ in turns):  # names everything, so it comes last
        turns.append(_caption_turn(scene, rng))
    return _samples(image.stem, turns, image)


def told_lines(seed: str, number: int) -> Iterator[str]:
    """Lines of a scene in words, which things are there, and a sentence: "...: dog yes, bus no. A".

    Every third line has the sentence only, as stage 1's template.
    """
    balance = ask.Existence()
    for index in range(number):
        scene = sample_scene(f"{seed}/{index}", SceneOptions())
        rng = random.Random(f"{scene.seed}/words")
        sentence = rng.choice(ask.captions(scene, rng, 5))
        if index % 3:
            names = balance.checklist(scene, rng)
            sentence = f"{', '.join(f'{name} {answer}' for name, answer in names)}. {sentence}"
        yield f"{in_words(scene, rng)}: {sentence}"


# From "dog yes" to the benchmark's question: further and further from the name to its answer. An
# answer right behind the name is what teaches a language model from scratch to look things up;
# questions alone, whose answer comes many tokens later, had not done so (results/LOG.md).
QUESTION_FORMS = (
    "{name} {yes}",
    "{name}? {yes}",
    "a {name}? {yes}",
    "is there {a_name}? {yes}",
    "Is there {a_name}? {Yes}",
    "Is there {a_name} in the image? {Yes}",
    f"Is there {{a_name}} in the image? {SHORT_ANSWER} {{Yes}}",
    "USER: Is there {a_name} in the image? ASSISTANT: {Yes}",
)


def question_lines(seed: str, number: int, far: bool) -> Iterator[str]:
    """Lines of a scene in words and which things are there, asked in one of QUESTION_FORMS.

    The early forms are more frequent; with `far` the late ones are.
    """
    balance = ask.Existence()
    for index in range(number):
        scene = sample_scene(f"{seed}/{index}", SceneOptions())
        rng = random.Random(f"{scene.seed}/bridge")
        names = balance.checklist(scene, rng)
        if len(names) < 10:
            names += balance.checklist(scene, rng)
        place = 1 - rng.random() ** 1.7 if far else rng.random() ** 1.5
        form = QUESTION_FORMS[min(int(place * len(QUESTION_FORMS)), len(QUESTION_FORMS) - 1)]
        asked = (
            form.format(name=name, a_name=with_article(name), yes=yes, Yes=yes.capitalize())
            for name, yes in names
        )
        yield f"{in_words(scene, rng)}: {', '.join(asked)}."


FACTS = {"existence": 2.0, "pair": 3.0, "open": 3.0, "choice": 3.0}
LETTERS = {"existence": 0.5, "pair": 0.5, "open": 0.5, "choice": 6.0}
MARKS = (("yes", "no"), ("yes", ""), ("", ""))  # behind right and wrong options


def fact_lines(seed: str, number: int, weights: Mapping[str, float]) -> Iterator[str]:
    """Lines of a scene in words and six questions of the given kinds, their answers near or far.

    Near is right behind the question; far, behind the instruction too; furthest, in the template.
    Near options may be marked one by one ("A. dog no B. cat yes: B"): a letter is learned only if
    the options were checked before.
    """
    balance = ask.Existence()
    for index in range(number):
        scene = sample_scene(f"{seed}/{index}", SceneOptions(sign_chance=0.5))
        rng = random.Random(f"{scene.seed}/facts")
        distance, marks = rng.choice((0, 0, 1, 2)), rng.choice(MARKS)
        kinds = rng.choices(list(weights), list(weights.values()), k=6)
        questions = (_question(kind, scene, rng, balance, set()) for kind in kinds)
        facts = (_fact(q, distance, marks, rng) for q in questions if q)
        yield f"{in_words(scene, rng)}: {' '.join(dict.fromkeys(facts))}"


def _fact(question: ask.Question, distance: int, marks: tuple[str, str], rng: random.Random) -> str:
    """A question and its answer on one line; `distance` from 0 to 2."""
    if not question.options:
        text = question.text if distance == 0 else f"{question.text} {SHORT_ANSWER}"
        answer = question.answer
    elif distance == 0:
        marked = (f"{o} {marks[o != question.answer]}".rstrip() for o in question.options)
        lettered = zip("ABCD", marked, strict=False)
        text = f"{question.text} {' '.join(f'{letter}. {option}' for letter, option in lettered)}:"
        answer = "ABCD"[question.options.index(question.answer)]
    else:
        text, answer = choice_turn(question, rng)
        text = text.replace("\n", " ")
    return f"USER: {text} ASSISTANT: {answer}" if distance == 2 else f"{text} {answer}."


def told_samples(seed: str, number: int) -> list[dict]:
    """Conversations about scenes told in words, which stand where pictures will."""
    balance, samples = ask.Existence(), []
    for index in range(number):
        scene = sample_scene(f"{seed}/{index}", SceneOptions())
        rng = random.Random(f"{scene.seed}/told")
        for sample in conversation_samples(scene, Path(f"d{index:06d}"), balance):
            del sample["image"]
            first = sample["conversations"][0]
            first["value"] = first["value"].replace(IMAGE, in_words(scene, rng))
            samples.append(sample)
    return samples


def labeled_samples(
    seed: str, number: int, styles: Sequence[str] = TRAINING_STYLES
) -> Iterator[tuple[dict, list[_Job]]]:
    """(sample, its pictures to draw) of conversations about things with signs."""
    presence, drawn = ask.Presence(), itertools.count()
    for index in range(number):
        talk = labeled_talk(f"{seed}/{index}", presence, styles, variants=True)
        jobs = [_Job(scene, _picture_path(f"l{next(drawn):06d}")) for scene in talk.scenes]
        paths = [job.path.as_posix() for job in jobs]
        sample = _sample(f"l{index:06d}", _labeled_turns(talk))
        sample["image"] = paths[0] if len(paths) == 1 else paths
        _show_first(sample, f"{IMAGE}\n" * len(paths))
        yield sample, jobs


def told_labeled_samples(seed: str, number: int) -> list[dict]:
    """The same of scenes told in words."""
    presence, samples = ask.Presence(), []
    for index in range(number):
        talk = labeled_talk(f"{seed}/{index}", presence)
        samples.append(_sample(f"s{index:06d}", _labeled_turns(talk)))
        told = "".join(f"{with_signs.words_of(scene)}\n" for scene in talk.scenes)
        _show_first(samples[-1], told)
    return samples


def _labeled_turns(talk: Talk) -> list[tuple[str, str]]:
    turns = [
        (one.text if one.kind == "signs" else f"{one.text}\n{SHORT_ANSWER}", one.answer)
        for one in talk.questions
    ]
    if talk.context:
        turns[0] = (f"{talk.context}\n{turns[0][0]}", turns[0][1])
    return turns


def _show_first(sample: dict, shown: str) -> None:
    """Put what is shown before the first question."""
    first = sample["conversations"][0]
    first["value"] = shown + first["value"]


def _turn(kind, scene, rng, balance, mentioned) -> tuple[str, str] | None:
    """(human text, answer) of one turn; adds the classes it gives away to `mentioned`."""
    if kind == "caption":
        mentioned.update(scene.counts)
        return _caption_turn(scene, rng)
    question = _question(kind, scene, rng, balance, mentioned)
    if question is None:
        return None
    mentioned.update(question.names)
    if kind == "choice":
        return choice_turn(question, rng)
    if kind == "textvqa":
        return f"{question.text}\n{ocr_line(question.answer, rng)}\n{SHORT_ANSWER}", question.answer
    return f"{question.text}\n{SHORT_ANSWER}", question.answer


def _question(kind, scene, rng, balance, mentioned) -> ask.Question | None:
    """A question of a kind, where the scene allows one."""
    if kind == "existence":
        return balance.ask(scene, rng, mentioned)
    if kind == "pair":
        pair = rng.choice(list(ask.PAIRS.values()))(scene, rng)
        return pair and pair.one(rng)
    if kind in ("textvqa", "read"):
        return ask.OPEN["read"](scene, rng)
    askers = ask.OPEN if kind == "open" else ask.CHOICES
    weights = [OPEN_WEIGHTS.get(name, 1) for name in askers] if kind == "open" else None
    return rng.choices(list(askers.values()), weights)[0](scene, rng)


def _caption_turn(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return CAPTION, ask.captions(scene, rng, 1)[0]


def ocr_tokens(word: str, rng: random.Random) -> list[str]:
    """What a text reader might have found: the word, sometimes with a wrong one, or nothing."""
    wrong = rng.choice([other for other in WORDS if other != word])
    return rng.choice([[word], [word], [word, wrong], [wrong, word], []])


def ocr_line(word: str, rng: random.Random) -> str:
    """The reference line of LLaVA's TextVQA prompts."""
    return f"Reference OCR token: {', '.join(ocr_tokens(word, rng))}"


def choice_turn(question: ask.Question, rng: random.Random) -> tuple[str, str]:
    """A question with lettered options; the answer is a letter, all letters equally often."""
    lettered = zip("ABCD", question.options, strict=False)
    lines = [f"{letter}. {option}" for letter, option in lettered]
    text = "\n".join([question.text, *lines, OPTION_LETTER])
    hint = rng.random()
    if hint < 0.15:  # ScienceQA's way of giving one
        text = f"Context: {rng.choice(HINTS)}\n{text}"
    elif hint < 0.25:  # MMBench's
        text = f"{rng.choice(HINTS)}\n{text}"
    return text, "ABCD"[question.options.index(question.answer)]


HINTS = ("Select the best answer.", "Look at the picture.", "Each card has one color.")


def text_sample(seed: str) -> dict:
    """A few turns without a picture."""
    rng = random.Random(seed)
    askers = rng.choices(list(ask.TEXT_ONLY.values()), k=6)
    return _sample(seed.replace("/", "-"), [choice_turn(asker(rng), rng) for asker in askers])


def easy_vqa_samples(out: Path, seed: int) -> list[dict]:
    """The train split of easy-VQA (package `easy-vqa`, MIT), short conversations."""
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError("the package easy-vqa is missing: pip install easy-vqa") from error
    (out / "easy_vqa").mkdir(parents=True, exist_ok=True)
    paths = easy_vqa.get_train_image_paths()
    talks: dict[int, list[tuple[str, str]]] = {}
    for text, answer, image_id in zip(*easy_vqa.get_train_questions(), strict=True):
        answer = answer.capitalize() if answer in ("yes", "no") else answer
        talks.setdefault(image_id, []).append((f"{text}\n{SHORT_ANSWER}", answer))
    samples = []
    for image_id, turns in sorted(talks.items()):
        path = Path("easy_vqa") / f"{image_id}.png"
        shutil.copyfile(paths[image_id], out / path)
        random.Random(f"{seed}/easy/{image_id}").shuffle(turns)
        samples += _samples(f"easy{image_id}", turns, path)
    return samples


def _samples(name: str, turns: Sequence[tuple[str, str]], image: Path) -> list[dict]:
    """The turns, TURNS_PER_SAMPLE at a time."""
    starts = range(0, len(turns), TURNS_PER_SAMPLE)
    return [
        _sample(f"{name}-{n}", turns[start : start + TURNS_PER_SAMPLE], image)
        for n, start in enumerate(starts)
    ]


def _sample(name: str, turns: Iterable[tuple[str, str]], image: Path | None = None) -> dict:
    """A sample of LLaVA's JSON; the first human turn begins with the image token."""
    conversations = list(
        itertools.chain.from_iterable(
            ({"from": "human", "value": text}, {"from": "gpt", "value": answer})
            for text, answer in turns
        )
    )
    if image is None:
        return {"id": name, "conversations": conversations}
    conversations[0]["value"] = f"{IMAGE}\n{conversations[0]['value']}"
    return {"id": name, "image": image.as_posix(), "conversations": conversations}


def _draw(jobs: Sequence[_Job], out: Path, workers: int) -> None:
    """Draw all pictures, in `workers` processes if more than one, with a progress bar."""
    for folder in {job.path.parent for job in jobs}:
        (out / folder).mkdir(parents=True, exist_ok=True)
    work = [(job.scene, out / job.path) for job in jobs]
    progress = functools.partial(tqdm, total=len(work), desc="pictures", unit="img")
    if workers == 1:
        deque(progress(map(_draw_one, work)), maxlen=0)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        deque(progress(pool.imap_unordered(_draw_one, work, chunksize=32)), maxlen=0)


def _draw_one(work: tuple[Scene, Path]) -> None:
    scene, path = work
    render(scene, augment=True).save(path, quality=88)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_json(path: Path, samples: list[dict]) -> None:
    write_atomically(path, json.dumps(samples, indent=0, ensure_ascii=False) + "\n")
