"""Pack WordNet's glosses into one small text file, once.

    python tools/pack_wordnet.py --wordnet /usr/share/wordnet

Reads the `data.*` files (Debian package `wordnet-base`, WordNet 3.0) and writes
`vlmamba/assets/text/wordnet.txt.xz`: a line a synset, its words separated by commas, a tab, its
gloss (a definition, then quoted example sentences).  WordNet's notice is in
`vlmamba/assets/NOTICE.md`; `vlmamba.demo.text` reads the file.
"""

from __future__ import annotations

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")


def synsets(path: Path) -> Iterator[str]:
    """The lines "word, word<tab>gloss" of a data file (format: wndb(5WN))."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the license, at the head of the file
            continue
        fields, _, gloss = line.partition(" | ")
        parts = fields.split(" ")
        count = int(parts[3], 16)
        words = [parts[4 + 2 * k].split("(")[0].replace("_", " ") for k in range(count)]
        yield f"{', '.join(words)}\t{' '.join(gloss.split())}"


def main() -> None:
    out = Path(__file__).resolve().parents[1] / "vlmamba" / "assets" / "text" / "wordnet.txt.xz"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args()
    lines = [line for part in PARTS for line in synsets(args.wordnet / f"data.{part}")]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    args.out.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    packed = args.out.stat().st_size
    print(f"{len(lines)} synsets, {len(text) / 1e6:.1f} MB, packed {packed / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
