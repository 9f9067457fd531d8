"""The tokens and labels that text and model agree on."""

IMAGE = "<image>"  # stands for a picture in a conversation
EOS = "<|endoftext|>"  # of GPT-NeoX's tokenizer and the demo's
IGNORE = -100  # the label of a position that is not trained on; torch's cross-entropy skips it
UNIT = "\x1f"  # in a line of text: parts what is only read from what is learned (vlmamba.data.text)


def without_tags(text: str) -> str:
    """Text that holds no IMAGE: nor one that is left where another was taken out of its middle."""
    return text.replace(IMAGE, "").replace(IMAGE, " ") if IMAGE in text else text
