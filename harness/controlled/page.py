"""results/STUDY.md: design, predictions, tables and pictures of the controlled study.

Everything below the first section is made of the records; the same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from harness.controlled import contrasts, outcomes
from harness.controlled.contrasts import Drawn, between_families, drawn
from harness.controlled.design import SIGNS
from harness.controlled.outcomes import RETRIEVAL, Outcome
from harness.controlled.pictures import all_pictures
from harness.controlled.predictions import ALPHA, OF_CONNECTORS, PREDICTIONS, connectors
from harness.controlled.records import Records
from harness.controlled.tables import accuracy, all_tables
from harness.reporting.plots import write_all
from vlmamba_core.folder import write_atomically

DESIGN = """# The controlled study

What does a state-space language model buy in a VLM, and what does its connector? Made by
`python -m harness.study`; `make tables plots` makes this page again from its records.

**Design.** Language models of equal size (mamba; mamba2; attention: rotary positions and a gated
MLP; hybrid: Mamba with one attention layer) are trained from scratch on the same lessons in the
same order (text; what stands beside a name in a scene told in words, first copied from few things,
then asked for nearby and further away; conversations), then with each connector (mlp; vss_l2 with
bsm; msc) on the same pictures in the same order, up to three seeds each. One text pretraining of a
family serves its seeds: they differ in the connector's start and in the order of stages 1 and 2,
not in the language model's start. The learning rate of stage 2 is chosen for each language model
among three on held-out samples, after short runs with the first connector, before anything else is
looked at; the lessons have one rate each, a third of it for attention, which learned text worse at
the full one (results/LOG.md). Scanning connectors have the same Mamba layer whatever the language
model. The encoder is frozen; an early stage stands beside its last features and a patch is a cell
of the scenes with signs, because a sign could not be read otherwise: a linear probe at its place
names 28 % of colors and 7 % of words in the last features of 49 patches, 99 and 99 % in these
(`tools/probe_encoder.py`). In both stages each image token also learns one word of what its patch
shows: without, no sign was read (results/LOG.md). Orders of the prompt (question before the
picture, OCR tokens before the question, row separators) have one seed and the first connector; each
is trained and asked in its order, but the text stages before it had the usual one, and only a
conversation's first question moves before the picture.

**Outcomes.** The demo's benchmarks; `retrieval` (one of k things is named, the answer stands on the
sign below it) by k and by the distance from picture to question, with existence questions on the
same scenes as its control, chance, and a text-only control; the update from which on the model uses
its picture; cost. Nothing here is comparable with published numbers.

**Statistics.** A score is a question's, paired between models by question and seed. Intervals are
of a hierarchical bootstrap over seeds, pictures and questions (`harness/scoring/hierarchical.py`).
Three seeds are few: such intervals are rough, and none of one seed speaks of others. Where all
answers are right, or all wrong, a bootstrap's interval has no width, which says nothing.
"""
STARTS = """
**Starts.** Text pretraining was done more than once, by the same commands; machines round sums
otherwise, and the models are others. `start` says which one a cell came from. Models are compared
within a start, predictions by the start that has most seeds of it, the first where they are equal.
The last comparison is of the same cells from two starts: as much may be luck of the first lessons.
"""
RULE = """The rule was fixed, and this list written, before the runs. Each prediction has an
interval of {level:.2f} % (1 - {alpha} / {count}: corrected for their number). "Above m" has held
where all of it is above m, has failed where all is below; "within m" has held where it lies between
-m and m, has failed where it lies wholly outside; else a prediction is undecided, as it is where
the models answer all alike. Verdicts before the last cell speak of the cells that are finished."""
CAPTIONS = {
    SIGNS: "Retrieval: accuracy of a family, all connectors and seeds, with 95 % intervals; from "
    "the first text pretraining.",
    "picture_use": "What another sample's picture costs, along stage 2; dashed: the threshold.",
    "loss": "Held-out loss along stage 2.",
    "pareto": "Accuracy on signs against speed and against what a sequence keeps in memory. "
    "Hollow: from another text pretraining than the first; its speeds compare among themselves.",
}


def write(kept: Records, file: Path) -> str:
    """Write the page to `file`, and its pictures to a folder of its name beside it."""
    files = all_pictures(kept)
    folder = file.with_suffix("").with_name(file.stem.lower())
    write_atomically(file, text(kept, folder.name, list(files)))
    if not files:
        return f"{file} written; no cell is finished"
    return f"{file} written; {write_all(folder, files)}"


def text(kept: Records, folder: str, files: list[str]) -> str:
    """The page; its pictures are `files` in `folder`."""
    tables = all_tables(kept)
    several = [STARTS.strip()] if len(contrasts.starts(kept)) > 1 else []
    blocks = [DESIGN.strip(), *several, conclusion(kept)]
    level = 100 * (1 - ALPHA / len(PREDICTIONS))
    rule = RULE.format(level=level, alpha=ALPHA, count=len(PREDICTIONS))
    for table in tables:
        note = rule if table.title == "Predictions" else table.note
        body = table.files()["md"].split("\n\n")[-1].strip()
        blocks += [f"## {table.title}", note, body]
    if files:
        blocks.append("## Pictures")
    for name in files:
        caption = CAPTIONS[Path(name).stem]
        blocks.append(f"![{caption}]({folder}/{name})\n\n{caption}")
    return "\n\n".join(blocks) + "\n"


def conclusion(kept: Records) -> str:
    """One sentence for a practitioner, of the comparison that the study is about; what is known."""
    if not kept.cells:
        return "**Nothing has been run yet.** The predictions below were written first."
    count = len({(*contrasts.model_of(cell)[:3], cell["seed"]) for cell in kept.cells.values()})
    twice = len(kept.cells) - count
    done = f"{count} cell{'s are' if count != 1 else ' is'} finished"
    done += f", {twice} of them from another start too." if twice else "."
    first, *others = contrasts.starts(kept)
    signs, existence = (_of_families(kept, first, outcome) for outcome in RETRIEVAL[2:4])
    if "attention" not in signs or "attention" not in existence:
        return f"**{done}** Attention and Mamba cannot be compared yet."
    low, high = signs["attention"].interval()
    mixed = signs.get("hybrid")
    if low > 0 and mixed is not None and mixed.interval()[0] > 0:
        advice = "prefer attention, or a few layers of it among Mamba's"
    elif low > 0 and mixed is not None:
        advice = "prefer attention; one layer of it among Mamba's was not enough here"
        advice += _no_reader(kept, "hybrid")
    elif low > 0:
        advice = "prefer attention"
    elif high < 0:
        advice = "attention bought nothing here"
    else:
        advice = "the choice of language model decides nothing at this size and budget"
    again = "".join(
        f" From text pretraining {start} signs among 8 or 16 are {_gaps(found)}."
        for start in others
        if (found := _of_families(kept, start, RETRIEVAL[2]))
    )
    return (
        f"**{done}** Compared with Mamba of the same size, trained alike: signs of named things "
        f"among 8 or 16, {_gaps(signs)}; whether a thing is there at all in the same scenes, "
        f"{_gaps(existence)}: where one item of many must be read off a picture, {advice}.{again}"
        f"{_of_connectors(kept)}"
    )


def _of_families(kept: Records, start: int, outcome: Outcome) -> dict[str, Drawn]:
    """Attention and the hybrid minus Mamba, those that can be told."""
    found = {
        name: drawn(kept, between_families(kept, name, contrasts.REFERENCE, start), outcome)
        for name in ("attention", "hybrid")
    }
    return {name: one for name, one in found.items() if one is not None}


def _of_connectors(kept: Records) -> str:
    """A sentence of each scanning connector against the first, from the start with most seeds."""
    said = ""
    for connector in contrasts.names(kept, 1):
        _, best = contrasts.best_told(kept, connectors(connector, "mlp"))
        seeds = len(contrasts.shared_seeds(kept, best))
        if connector == "mlp" or not seeds:
            continue
        gaps = {name: drawn(kept, best, outcome) for name, outcome in OF_CONNECTORS.items()}
        families = " and ".join(dict.fromkeys(model[0] for _, model in best.terms))
        of = "one seed" if seeds == 1 else f"{seeds} seeds"
        said += f" {connector} in place of mlp, on {families}, {of}: {_gaps(gaps)}."
    return said


def _no_reader(kept: Records, family: str) -> str:
    """A caveat where a family names an only thing's sign less often than a random one in view.

    Of its first connector, the one that rates were chosen with.
    """
    alone = outcomes.part("k", 1)
    model = next(model for model in contrasts.models(kept) if model[0] == family)
    cells = list(contrasts.seeds_of(kept, model).values())
    found, chance = accuracy(kept, cells, alone), 100 * outcomes.chance(kept, alone)
    if found is None or found[2] >= chance:
        return ""
    return (
        f" (but it had not learned to read signs at all: with one thing it named {found[0]:.1f} %, "
        f"a random sign in view would be right in {chance:.1f} %)"
    )


def _gaps(found: Mapping[str, Drawn | None]) -> str:
    """Such as "attention +1.0 points (+0.5 to +1.5)", of those that there are."""
    gaps = []
    for name, one in found.items():
        if one is not None:
            low, high = one.interval()
            gap, between = 100 * one.mean, f"{100 * low:+.1f} to {100 * high:+.1f}"
            gaps.append(f"{name} {gap:+.1f} points ({between})")
    return ", ".join(gaps)
