"""The models that speed is measured of: VLM configurations by name, with random weights.

    model = build("pythia-160m")        # BASELINES, "vl-mamba-SIZE", presets of published VLMs
    logits, cache = prefill(model, embed(model, input_ids, image_features))
    logits = step(model, logits.argmax(-1), cache)

Every one is built as training and evaluation build theirs, and differs in its `text_config` only:
SigLIP features of 729 patches go through the same connector and stand before the text (a published
VLM's through its own connector).  A
baseline's language model is transformers' own, wrapped, with its default attention and cache.

Shapes: B batch, P patches, T text tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.runs.points import VL_MAMBA
from vlmamba import registry
from vlmamba.config import LARGEST_GRID, VLMambaConfig
from vlmamba.configs.language import TEXT_FIELDS
from vlmamba.configs.presets import LANGUAGE_MODELS, VISION_ENCODERS
from vlmamba.configs.vlms import VLM_PRESETS
from vlmamba.models.language import Cache, LanguageModel
from vlmamba.models.quantized import QuantizedLinear, quantize
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import UserError
from vlmamba_core.names import choose

SHAPE_FIELDS = {*TEXT_FIELDS, "connector", "language_model_id"}
ENCODER = "siglip-so400m-384"
# What `tiny` lays over a shape: the same architecture for tests, in no time.
TINY_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1008}
TINY_ATTENTION = {"num_attention_heads": 2, "intermediate_size": 64}
TINY_VL_MAMBA = {"d_model": 32, "n_layer": 2, "vocab_size": 1008, "language_model_id": None}
TINY_VL_MAMBA |= {"head_dim": 8}  # of Mamba-2 and attention
TINY_ENCODER = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2}


def _transformer(
    model_type: str, width: int, layers: int, heads: int, mlp: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2**17,  # no sweep is cut short by it
    }


def _mamba(width: int, layers: int) -> dict[str, Any]:
    shape = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50280}
    return {"model_type": "mamba", **shape}


# Text configurations: shapes of the published checkpoints.
BASELINES: dict[str, dict[str, Any]] = {
    "transformers-mamba-130m": _mamba(768, 24),
    "transformers-mamba-1.4b": _mamba(2048, 48),
    "transformers-mamba-2.8b": _mamba(2560, 64),
    "pythia-160m": _transformer("gpt_neox", 768, 12, 12, 3072, 50304),
    "pythia-1.4b": _transformer("gpt_neox", 2048, 24, 16, 8192, 50304),
    "pythia-2.8b": _transformer("gpt_neox", 2560, 32, 32, 10240, 50304),
    "phi-2": _transformer("phi", 2560, 32, 32, 10240, 51200),
    "llama-160m": _transformer("llama", 768, 12, 12, 3072, 32000),
    "mobilellama-1.4b": _transformer("llama", 2048, 24, 16, 5504, 32000),
    "mobilellama-2.7b": _transformer("llama", 2560, 32, 32, 6912, 32000),
}


def build(
    name: str,
    *,
    connector: str = "vss_l2",
    encoder_layers: int = 0,
    image_tokens: int | None = None,
    tiny: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: str | None = None,
    seed: int = 0,
) -> VLMambaForConditionalGeneration:
    """The model called `name` with random weights, in inference mode.

    With encoder_layers 0, image features are given and no encoder takes memory; SigLIP has 27.
    image_tokens: what the connector makes of a picture (default: of SigLIP's 27 x 27 patches).
    tiny: every dimension shrunk.  weights: a kind of vlmamba.models.quantized for the language
    model's, after all else; the numbers that it multiplies stay of `dtype`.
    Raises UserError that lists the known names, where no square grid of patches becomes so many
    tokens, and for `weights` of a model that has no such layers.
    """
    name = choose_model(name)
    if weights is not None and not quantizable(name):
        raise UserError(f"{name} has no {weights} weights: its language model is transformers' own")
    shape = _language_model(name, tiny)
    connector = shape.pop("connector", connector)
    vision = VISION_ENCODERS[ENCODER] | {"num_hidden_layers": encoder_layers}
    vision |= TINY_ENCODER if tiny else {}
    if image_tokens is not None:
        vision |= {"image_size": vision["patch_size"] * _side(connector, image_tokens)}
    config = VLMambaConfig(**shape, connector=connector, vision_config=vision)
    torch.manual_seed(seed)
    model: Any = VLMambaForConditionalGeneration(config)  # transformers hides the type of `to`
    model.to(device=device, dtype=dtype).eval()
    if weights is not None:
        quantize(model.language_model, weights)
    return model


def _side(connector: str, image_tokens: int) -> int:
    """Patches along a side of the grid of which the connector makes so many tokens."""
    tokens = registry.connectors[connector].tokens
    for side in range(1, LARGEST_GRID + 1):
        if tokens((side, side)) == image_tokens:
            return side
    raise UserError(f"connector {connector!r} makes {image_tokens} tokens of no square grid")


def _language_model(name: str, tiny: bool) -> dict[str, Any]:
    """A configuration's fields that say which language model it has, and which connector if any."""
    whole = VLM_PRESETS.get(name, {})
    if name.startswith(VL_MAMBA) or (whole and "text_config" not in whole):
        shape = whole or LANGUAGE_MODELS[name.removeprefix(VL_MAMBA)]
        shape = {key: value for key, value in shape.items() if key in SHAPE_FIELDS}
        if not tiny:
            return shape
        pattern = str(shape.get("mixer", "mamba")).split(",")
        adaptors = {"adaptors": [1]} if "adaptors" in shape else {}
        return shape | TINY_VL_MAMBA | {"n_layer": max(2, len(pattern))} | adaptors
    spec = whole["text_config"] if whole else BASELINES[name]
    spec = spec | (TINY_TRANSFORMER if tiny else {})
    if tiny and "num_attention_heads" in spec:
        spec |= TINY_ATTENTION
    return {"text_config": spec} | ({"connector": whole["connector"]} if whole else {})


def choose_model(name: str) -> str:
    """The model of that name, in any case. Raises UserError that lists the known names."""
    sizes = {VL_MAMBA + size for size in LANGUAGE_MODELS if "nano" not in size}
    return choose("model", name, sizes | BASELINES.keys() | VLM_PRESETS.keys())


def quantizable(name: str) -> bool:
    """Whether the model of that name may have whole numbers as weights: those of our own layers."""
    return "text_config" not in _language_model(choose_model(name), tiny=False)


def embed(
    model: VLMambaForConditionalGeneration, input_ids: Tensor, image_features: Tensor | None = None
) -> Tensor:
    """Text tokens (B, T), after image features (B, P, Dv) if given -> (B, P + T, D)."""
    if image_features is None:
        return model.language_model.embed(input_ids)
    everyone = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    text = model.language_model.embed(input_ids, everyone)
    embeds = torch.cat([model.connector(image_features).to(text.dtype), text], dim=1)
    return model.language_model.mark_pictured(embeds, everyone)


def prefill(model: VLMambaForConditionalGeneration, embeds: Tensor) -> tuple[Tensor, Cache]:
    """(B, L, D) -> logits after the last token (B, V), and the cache."""
    hidden, cache = model.language_model(embeds)
    return model.language_model.head(hidden[:, -1]), cache


def step(model: VLMambaForConditionalGeneration, tokens: Tensor, cache: Cache) -> Tensor:
    """One token each (B,) -> logits (B, V); the cache is updated in place."""
    language_model = model.language_model
    embeds = language_model.embed(tokens, cache.pictured)
    return language_model.head(language_model.step(embeds, cache))


def weight_bytes(language_model: LanguageModel) -> int:
    """Bytes of weights that a generated token reads: the language model with its head.

    An input embedding that is not also the head is left out: a token reads one row of it.  Of
    several heads it reads one, here that of a row with a picture.
    """
    owners = language_model.heads
    read = _weights(language_model)
    for owner in owners:
        for name in ("embedding", "lm_head"):
            for key in _weights(owner.get_submodule(name)):
                read.pop(key, None)
    read |= _weights(owners[-1].get_submodule("lm_head"))
    return sum(tensor.nbytes for tensor in read.values())


def _weights(part: nn.Module) -> dict[int, Tensor]:
    """Parameters, and whole numbers with their scales, each once."""
    packed = (m for m in part.modules() if isinstance(m, QuantizedLinear))
    numbers = (buffer for module in packed for buffer in module.buffers(recurse=False))
    return {id(tensor): tensor for tensor in (*part.parameters(), *numbers)}


def prefill_flops(language_model: LanguageModel, tokens: int) -> float:
    """FLOPs from one prompt's embeddings to the logits after its last token."""
    return language_model.flops(tokens) + 2.0 * language_model.embedding.weight.numel()


def attention(language_model: LanguageModel) -> str | None:
    """transformers' attention function, such as "sdpa"; None for a model without attention."""
    config: Any = language_model.config
    if not hasattr(config, "num_attention_heads"):
        return None
    return getattr(config, "_attn_implementation", None)
