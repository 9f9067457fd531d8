"""How large a report of many answers is, and how long Chromium takes to load it.

    python tools/time_report.py                     # 20,000 answers about 1,000 pictures
    python tools/time_report.py --pictures 3000     # more pictures than fit into the page

Prints one JSON line. The time is the page's own, from the start of navigation to the end of its
script in headless Chromium: the median of three.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from harness import report
from harness.data.images import image_key

REPEATS = 3
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--dump-dom")
PROMPT = "Is there a dog in the image, beside the tree?\nAnswer with a single word or phrase."


def photograph(seed: int) -> bytes:
    """A JPEG of 640 by 480 pixels that compresses about as badly as a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = pixels + generator.normal(0, 9, pixels.shape).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_run(folder: Path, answers: int, pictures: int) -> Path:
    """A finished run of POPE with that many answers, and its data."""
    data, run = folder / "data", folder / "run"
    data.mkdir()
    run.mkdir()
    images = [{"bytes": photograph(seed), "path": None} for seed in range(pictures)]
    keys = [image_key(image) for image in images]
    rows: list[dict[str, Any]] = []
    with (run / "samples_pope.jsonl").open("w", encoding="utf-8") as file:
        for row in range(answers):
            reference, prediction = ("yes", "no")[row % 2], ("Yes", "No")[row % 3 % 2]
            kind = ("random", "popular", "adversarial")[row % 3]
            shown = {"question": PROMPT, "answer": reference, "category": kind}
            rows.append(shown | {"image": images[row % pictures], "question_id": str(row)})
            right = float(prediction.lower() == reference)
            sample = {"doc_id": row, "question": PROMPT, "prediction": prediction}
            sample |= {"parsed": prediction.lower(), "reference": reference, "score": right}
            file.write(json.dumps(sample | {"image": keys[row % pictures]}) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), data / "pope.parquet")
    entry = {"n": answers, "n_unparsed": 0, "excluded": {}, "unit": "fraction", "notes": []}
    metrics = {"f1": {"value": 0.5}, "accuracy": {"value": 0.5}}
    record = {"schema": 1, "kind": "evaluation", "label": None, "protocol": "paper"}
    record |= {"arguments": {"model": "nano", "data": str(data), "tasks": "pope"}}
    record |= {"tasks": {"pope": entry | {"metrics": metrics}}}
    (run / "record.json").write_text(json.dumps(record))
    return run


def seconds(browser: str, page: Path) -> float:
    """Median time of loading a page, each time in a browser of its own."""
    times = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as profile:
            command = [browser, *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
            done = subprocess.run(command, check=True, capture_output=True, timeout=300)
        loaded = re.search(rb'data-loaded-ms="(\d+)"', done.stdout)
        if loaded is None:
            raise SystemExit("the page's script did not end")
        times.append(int(loaded[1]) / 1000)
    return statistics.median(times)


def measure(answers: int, pictures: int) -> dict[str, float]:
    """Size and loading time of a page of that many answers."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as name:
        run, page = write_run(Path(name), answers, pictures), Path(name) / "report.html"
        limits = ["--max-samples", str(answers), "--max-images", str(pictures)]
        if report.main([str(run), "--out", str(page), *limits]) != 0:
            raise SystemExit(1)
        found = {"answers": answers, "pictures": pictures, "page_mb": page.stat().st_size / 1e6}
        return found | ({"load_s": seconds(browser, page)} if browser else {})


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--pictures", type=int, default=1000)
    args = parser.parse_args()
    print(json.dumps(measure(args.answers, args.pictures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
