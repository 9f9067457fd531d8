"""TextVQA's question: LLaVA-1.5 adds the OCR tokens that come with the data, lmms-eval does not.

Where they stand moves a recurrent model's score by more than ten points (Cobra: 58.2 with the
tokens before the question, 43.0 behind it, 47.9 without), so it is a choice: --ocr.
"""

from __future__ import annotations

from tasks.common import SHORT_ANSWER, Doc
from vlmamba_core.errors import UserError

OCR_LINE = "Reference OCR token: "


def short_question(doc: Doc, ocr: str) -> str:
    """The question with only its first letter in upper case, [the OCR tokens,] the instruction.

    Raises UserError where the tokens are asked for and the document has no such column.
    """
    lines = [doc["question"].capitalize()]
    if ocr != "none":
        if doc.get("ocr_tokens") is None:
            raise UserError(
                "textvqa: the prompt holds OCR tokens, but a row has no 'ocr_tokens'; add the "
                "column (an empty list means none) or TextVQA_Rosetta_OCR_*.json, or use --ocr none"
            )
        tokens = f"{OCR_LINE}{', '.join(doc['ocr_tokens'])}"
        lines.insert(0 if ocr == "first" else 1, tokens)
    return "\n".join([*lines, SHORT_ANSWER])
