"""TextVQA's question: LLaVA-1.5 adds the OCR tokens that come with the data, lmms-eval does not."""

from __future__ import annotations

from tasks.common import SHORT_ANSWER, Doc
from tasks.errors import UserError


def short_question(doc: Doc, with_ocr: bool) -> str:
    """The question with only its first letter in upper case, [the OCR tokens,] the instruction.

    Raises UserError where the tokens are asked for and the document has no such column.
    """
    lines = [doc["question"].capitalize()]
    if with_ocr:
        if doc.get("ocr_tokens") is None:
            raise UserError(
                "textvqa: the paper protocol puts OCR tokens in the prompt, but a row has no "
                "'ocr_tokens'; add the column (an empty list means none), or use --protocol lmms"
            )
        lines.append(f"Reference OCR token: {', '.join(doc['ocr_tokens'])}")
    return "\n".join([*lines, SHORT_ANSWER])
