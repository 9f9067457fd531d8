"""Plain text for pretraining a small language model: documents -> token file -> equal blocks.

Sources are `.txt` (one document a line) and LLaVA `.json` files (the whole conversation in the
instruction template, without its image), so that the small model knows words and template before
it sees an image.  Tokens are packed without padding, documents end with "<|endoftext|>".

Unit separators (U+001F) in a line part what is only read from what is learned, in turns: of
"cat blue: cat", separator, " blue" the last word is learned.  A line without them is learned whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vlmamba.data.examples import Example
from vlmamba.data.llava import LlavaFile, Sample
from vlmamba.processing import conversation_text, without_images
from vlmamba_core.chunks import chunks
from vlmamba_core.errors import UserError
from vlmamba_core.tokens import IGNORE, UNIT, without_tags

SPACE = " \t\r\n\f\v"  # taken off a line's ends; str.strip() would take UNIT for white space, too
READ_ONLY = np.uint32(1 << 31)  # set in a token of the file that is not to be predicted


def documents(paths: Iterable[Path], skipped: Counter[str]) -> Iterator[str | Sample]:
    """Lines of the text files, without `<image>` tags, and samples of the LLaVA files, in order.

    Unusable samples are counted in `skipped` by reason.
    """
    for path in map(Path, paths):
        if path.suffix == ".json":
            yield from LlavaFile(path).samples(skipped)
        elif path.suffix == ".txt" and path.is_file():
            try:
                with open(path, encoding="utf-8-sig") as file:
                    lines = (without_tags(line).strip(SPACE) for line in file)
                    yield from (line for line in lines if line.strip(SPACE + UNIT))
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {error}") from error
        else:
            raise UserError(f"no text in {str(path)!r}; expected an existing .txt or .json file")


def plain_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Every document as the model will read it, for training a tokenizer.

    Conversations come in their template, or its words would cost a token a letter.
    """
    for document in documents(paths, Counter()):
        if isinstance(document, str):
            yield document.replace(UNIT, "")
        else:
            yield conversation_text(document.conversations)


def tokenize_documents(
    paths: Iterable[Path], processor: Any, out: Path, template: str = "vicuna_v1"
) -> Path:
    """Write all documents' token ids, each closed by the end token, as uint32 to `out`."""
    partial = out.with_suffix(".partial")
    skipped: Counter[str] = Counter()
    with open(partial, "wb") as file:
        found = tqdm(documents(paths, skipped), desc="tokenizing", unit="")
        for ids in _token_ids(found, processor, template):
            file.write(ids.tobytes())
    partial.replace(out)
    if skipped:
        tqdm.write(f"left out of the text: {dict(skipped)}")
    return out


def first_tokens(
    paths: Iterable[Path], processor: Any, count: int, template: str = "vicuna_v1"
) -> np.ndarray:
    """The first `count` of the token ids that `tokenize_documents` writes, or all; uint32."""
    found, total = [np.zeros(0, dtype=np.uint32)], 0
    for ids in _token_ids(documents(paths, Counter()), processor, template):
        found.append(ids)
        total += len(ids)
        if total >= count:
            break
    return np.concatenate(found)[:count]


def _token_ids(
    found: Iterable[str | Sample], processor: Any, template: str
) -> Iterator[np.ndarray]:
    """Each document's token ids with the end token, uint32."""
    tokenizer = processor.tokenizer
    end = np.array([tokenizer.eos_token_id], dtype=np.uint32)
    for chunk in chunks(found, 1000):
        texts = [document for document in chunk if isinstance(document, str)]
        encoded = _line_ids(texts, tokenizer)
        for document in chunk:
            if isinstance(document, str):
                opening = np.array(processor.opening(document), dtype=np.uint32)
                yield np.concatenate([opening, next(encoded), end])
            else:
                ids = _conversation_ids(document, processor, template)
                yield ids if ids[-1] == end[0] else np.concatenate([ids, end])


def _line_ids(texts: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Each line's token ids, uint32, READ_ONLY set in those that end in a part to be read only."""
    if not texts:
        return
    whole = [text.replace(UNIT, "") for text in texts]
    parted = any(UNIT in text for text in texts)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=parted)
    for row, text in enumerate(texts):
        ids = np.array(encoded["input_ids"][row], dtype=np.uint32)
        if UNIT in text:
            ends = np.array(encoded["offset_mapping"][row])[:, 1]
            borders = np.cumsum([len(part) for part in text.split(UNIT)])
            ids[np.searchsorted(borders, ends) % 2 == 0] |= READ_ONLY
        yield ids


def _conversation_ids(sample: Sample, processor: Any, template: str) -> np.ndarray:
    turns = without_images(sample.conversations)
    ids, _ = processor.training_example(turns, images=0, template=template)
    return np.asarray(ids, dtype=np.uint32)


class PackedText:
    """Blocks of `block` consecutive tokens of a token file; all but those marked are predicted.

    tokens: the file, or its content.
    """

    image_argument = "pixel_values"

    def __init__(self, tokens: Path | np.ndarray, block: int):
        self.tokens, self.block = tokens, block
        size = len(tokens) if isinstance(tokens, np.ndarray) else tokens.stat().st_size // 4
        count = size // block
        if not count:
            raise UserError(f"too little text: less than one block of {block} tokens")
        self.lengths = np.full(count, block)

    def __len__(self) -> int:
        return len(self.lengths)

    def name(self, position: int) -> str:
        """How messages name a block."""
        return f"{self.tokens}: block {position}"

    def __getitem__(self, position: int) -> Example:
        first = self.block * position
        if isinstance(self.tokens, np.ndarray):
            found = self.tokens[first : first + self.block]
        else:
            found = np.fromfile(self.tokens, np.uint32, self.block, offset=4 * first)
        ids = (found & ~READ_ONLY).astype(np.int64)
        labels = np.where(found & READ_ONLY, IGNORE, ids)
        return Example(torch.from_numpy(ids), torch.from_numpy(labels))
