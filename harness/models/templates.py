"""What stands around a question: the model's own chat template, or a named one.

    template = choose(processor, None)            # the model's own where it has one, else plain
    text = template.render(processor, "Is there a dog?", images=1)

A wrong template costs more points than most changes to a model, so a record names the one used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from harness.models.base import Turn
from vlmamba.processing import SYSTEM
from vlmamba_core.errors import UserError, unknown
from vlmamba_core.names import match

CHAT = "chat_template"  # the name of the one that the model's processor brings along
PLAIN = "plain"

# {images}: an image token for each picture, {lines}: each on a line of its own; {question}: the
# text of the user's turn, {stripped}: without white space around it
NAMED = {
    PLAIN: "{images}{question}",
    # LLaVA-1.5 and its kin (Vicuna's conversation with its system sentence)
    "vicuna_v1": f"{SYSTEM} USER: {{lines}}{{question}} ASSISTANT:",
    # LLaVA-1.6 on Mistral
    "mistral_instruct": "[INST] {lines}{question} [/INST]",
    # Cobra and ML-Mamba on mamba-chat (ZephyrChatPromptBuilder), their picture before all text
    "cobra": "{images}<|user|>\n{stripped}<|endoftext|>\n<|assistant|>\n",
}


@dataclass(frozen=True)
class Template:
    """name: what a record calls it.  text: a Jinja chat template, or one of NAMED.

    in_words: a chat template that was written for text: a message is one text, its pictures' tokens
    in front of it on lines of their own, as LLaVA writes them.
    """

    name: str
    text: str
    chat: bool
    in_words: bool = False

    def describe(self) -> dict[str, str]:
        """What a record says of it."""
        return {"name": self.name, "sha256": hashlib.sha256(self.text.encode()).hexdigest()}

    def render(
        self, processor: Any, question: str, images: int, before: Sequence[Turn] = ()
    ) -> str:
        """The prompt's text with an image token for each picture.

        before: earlier turns, for which only a chat template has room; `images` has theirs too.
        """
        if not self.chat:
            token = image_token(processor)
            return self.text.format(
                images=token * images,
                lines=f"{token}\n" * images,
                question=question,
                stripped=question.strip(),
            )
        turns = messages(question, images, before, image_token(processor))
        if self.in_words:
            turns = [turn | {"content": _as_text(turn, image_token(processor))} for turn in turns]
        return processor.apply_chat_template(
            turns, chat_template=self.text, add_generation_prompt=True, tokenize=False
        )


def messages(
    question: str, images: int, before: Sequence[Turn], token: str
) -> list[dict[str, Any]]:
    """Chat messages, the pictures of a turn before its text.

    A text cannot bring pictures along: `token`, which stands for one, is taken out of it.
    """
    turns = [*before, Turn("user", question, images - sum(turn.pictures for turn in before))]
    return [
        {
            "role": turn.role,
            "content": [{"type": "image"}] * turn.pictures
            + [{"type": "text", "text": turn.text.replace(token, "")}],
        }
        for turn in turns
    ]


def _as_text(turn: dict[str, Any], token: str) -> str:
    return "".join(part.get("text", f"{token}\n") for part in turn["content"])


def _shows_pictures(template: Template, processor: Any) -> bool:
    """Whether a chat template writes something for a picture, and the text beside it.

    One for text writes the list of parts itself, its texts alone, or nothing.
    """
    asked = "What?"
    try:
        without, told = (template.render(processor, asked, images=count) for count in (0, 1))
    except Exception:  # Jinja's, with the template's own words, or what it does to a list
        return False
    lists = any(mark in told for mark in ("'type'", '"type"'))
    return told != without and asked in told and asked in without and not lists


def choose(processor: Any, name: str | None) -> Template:
    """The template called `name`, one of NAMED, chat_template, or a file with a Jinja template.

    None: the model's own, or plain where it has none. Raises UserError for an unknown name.
    """
    own = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if name is None:
        name = CHAT if own else PLAIN
    name = match(name, (CHAT, *NAMED)) or name
    if name == CHAT:
        if not own:
            raise UserError(f"this model brings no chat template; choose {', '.join(NAMED)}")
        chosen = _in_its_form(Template(CHAT, own, chat=True), processor)
        if not _shows_pictures(chosen, processor):
            raise UserError(
                "this model's chat template writes no picture and question of a message; choose "
                f"{', '.join(NAMED)} or a file with --template"
            )
        return chosen
    if name in NAMED:
        return Template(name, NAMED[name], chat=False)
    if Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
        return _in_its_form(Template(Path(name).name, text, chat=True), processor)
    raise unknown("template", name, [CHAT, *NAMED])


def _in_its_form(template: Template, processor: Any) -> Template:
    """A chat template, given messages as text where it shows them so alone."""
    in_words = replace(template, in_words=True)
    as_text = not _shows_pictures(template, processor) and _shows_pictures(in_words, processor)
    return in_words if as_text else template


def places_pictures(processor: Any) -> bool:
    """Whether the processor adds a picture's tokens itself, besides those that a text asks for.

    BLIP-2's does: a tag in the text would stand for a picture that is not there.  BLIP's text has
    no place for them: to its tokenizer a tag is a word.
    """
    tag = image_token(processor)
    token = processor.tokenizer.convert_tokens_to_ids(tag)
    if token is None or token == processor.tokenizer.unk_token_id:
        return True
    counts = []
    for text in ("a", f"{tag}a"):
        try:
            inputs = processor(text=[text], images=[[Image.new("RGB", (32, 32))]])
        except Exception:  # whatever a processor says of a text without tags
            return False
        counts.append(list(inputs["input_ids"][0]).count(token))
    return 0 < counts[0] < counts[1]


def image_token(processor: Any) -> str:
    """What stands for a picture in this processor's text."""
    for holder in (processor, processor.tokenizer):
        token = getattr(holder, "image_token", None)
        if token:
            return str(token)
    return "<image>"
