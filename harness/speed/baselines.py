"""Models to compare with, behind one interface: image features and tokens in, logits out.

    model = build("pythia-160m")                       # names: BASELINES and "vl-mamba-SIZE"
    logits, cache = model.prefill(model.embed(input_ids, image_features))
    logits = model.step(logits.argmax(-1), cache)

Every model sits in the same shell: SigLIP features of 729 patches go through the same connector
and stand before the text. Weights are random: only speed and memory are compared. The baselines'
language models are transformers' own, with its default attention (SDPA) and cache.

Shapes: B batch, P patches, T text tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vlmamba.config import LANGUAGE_MODELS, VISION_ENCODERS, VLMambaConfig
from vlmamba.models.language import LanguageModel
from vlmamba.models.language.mamba import MambaState
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba_core.errors import unknown

OURS = "vl-mamba-"  # followed by a name of LANGUAGE_MODELS
ENCODER = "siglip-so400m-384"
# What `tiny` lays over a shape: the same architecture for tests, in no time.
TINY_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 1008}
TINY_ATTENTION = {"num_attention_heads": 2, "intermediate_size": 64}
TINY_OURS = {"d_model": 32, "n_layer": 2, "vocab_size": 1008, "language_model_id": None}
TINY_OURS |= {"head_dim": 8}  # of Mamba-2
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


# Shapes of the published checkpoints.
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
    seed: int = 0,
) -> VLMBase:
    """The model called `name` with random weights, in inference mode.

    With encoder_layers 0, image features are given and no encoder takes memory; SigLIP has 27.
    image_tokens: P, a square number (default: SigLIP's 729).  tiny: every dimension shrunk.
    Raises UserError that lists the known names.
    """
    check(name)
    torch.manual_seed(seed)
    vision = VISION_ENCODERS[ENCODER] | {"num_hidden_layers": encoder_layers}
    vision |= TINY_ENCODER if tiny else {}
    if image_tokens is not None:
        vision |= {"image_size": vision["patch_size"] * math.isqrt(image_tokens)}
    if name.startswith(OURS):
        shape = LANGUAGE_MODELS[name.removeprefix(OURS)] | (TINY_OURS if tiny else {})
        config = VLMambaConfig(**shape, connector=connector, vision_config=vision)
        model: VLMBase = OurVLM(VLMambaForConditionalGeneration(config))
    else:
        spec = BASELINES[name] | (TINY_TRANSFORMER if tiny else {})
        if tiny and "num_attention_heads" in spec:
            spec |= TINY_ATTENTION
        shell = VLMambaConfig(
            d_model=spec["hidden_size"],
            n_layer=1,
            vocab_size=8,
            connector=connector,
            vision_config=vision,
        )
        language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec))
        model = TransformersVLM(VLMambaForConditionalGeneration(shell), language_model)
    return model.to(device=device, dtype=dtype).eval()


def check(name: str) -> None:
    """Raise UserError that lists the known names, unless `name` is one."""
    ours = {OURS + size for size in LANGUAGE_MODELS if size != "nano"}
    if name not in ours and name not in BASELINES:
        raise unknown("model", name, {*ours, *BASELINES})


class VLMBase(nn.Module):
    """What a benchmark needs of a model."""

    shell_config: VLMambaConfig  # of encoder and connector
    vision_encoder: nn.Module
    connector: nn.Module
    language_model: nn.Module
    embedding: nn.Embedding

    def embed(self, input_ids: Tensor, image_features: Tensor | None = None) -> Tensor:
        """Text tokens (B, T), after image features (B, P, Dv) if given -> (B, P + T, D)."""
        text = self.embedding(input_ids)
        if image_features is None:
            return text
        return torch.cat([self.connector(image_features).to(text.dtype), text], dim=1)

    def hidden(self, embeds: Tensor) -> Tensor:
        """(B, L, D) -> the language model's last hidden states (B, L, D), for a loss."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V)."""
        raise NotImplementedError

    def prefill(self, embeds: Tensor) -> tuple[Tensor, Any]:
        """(B, L, D) -> logits after the last token (B, V), and the cache."""
        raise NotImplementedError

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """One token each (B,) -> logits (B, V); the cache is updated."""
        raise NotImplementedError

    def crop(self, cache: Any, tokens: int) -> None:
        """Forget all but the first `tokens` tokens; a recurrent state is left as it is."""

    def weight_bytes(self) -> int:
        """Bytes of weights that a generated token reads: the language model with its head.

        An input embedding that is not also the head is left out: a token reads one row of it.
        """
        raise NotImplementedError


class OurVLM(VLMBase):
    """VLMambaForConditionalGeneration behind the common interface."""

    language_model: LanguageModel

    def __init__(self, model: VLMambaForConditionalGeneration):
        super().__init__()
        self.model, self.shell_config = model, model.config
        self.vision_encoder, self.connector = model.vision_encoder, model.connector
        self.language_model, self.embedding = model.language_model, model.get_input_embeddings()

    def hidden(self, embeds: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.language_model(embeds)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.language_model.head(hidden)

    def prefill(self, embeds: Tensor) -> tuple[Tensor, MambaState]:
        """(B, L, D) -> logits (B, V) and the state."""
        hidden, state = self.language_model(embeds)
        return self.language_model.head(hidden[:, -1]), state

    def step(self, tokens: Tensor, cache: MambaState) -> Tensor:
        """(B,) -> (B, V); the state is updated in place."""
        return self.language_model.head(self.language_model.step(self.embedding(tokens), cache))

    def weight_bytes(self) -> int:
        """The tied embedding is the head."""
        return sum(p.nbytes for p in self.language_model.parameters())


class TransformersVLM(VLMBase):
    """A causal language model of transformers in the shell of one of ours."""

    language_model: PreTrainedModel

    def __init__(self, shell: VLMambaForConditionalGeneration, language_model: PreTrainedModel):
        super().__init__()
        self.shell_config = shell.config
        self.vision_encoder, self.connector = shell.vision_encoder, shell.connector
        self.language_model = language_model
        self.embedding = cast(nn.Embedding, language_model.get_input_embeddings())
        names = {"mamba": "cache_params"}
        self.cache_name = names.get(language_model.config.model_type, "past_key_values")

    def hidden(self, embeds: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.language_model.base_model(inputs_embeds=embeds, use_cache=False)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.language_model.get_output_embeddings()(hidden)

    def prefill(self, embeds: Tensor) -> tuple[Tensor, Any]:
        """(B, L, D) -> logits (B, V) and transformers' cache."""
        output = self.language_model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], output[self.cache_name]

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """(B,) -> (B, V); the cache is updated in place."""
        return self.language_model(
            input_ids=tokens[:, None], use_cache=True, **{self.cache_name: cache}
        ).logits[:, -1]

    def crop(self, cache: Any, tokens: int) -> None:
        """Cut the keys and values, where there are any."""
        if self.cache_name == "past_key_values":
            cache.crop(min(0, tokens - cache.get_seq_length()))  # counts what to remove

    def weight_bytes(self) -> int:
        """Without the input embedding, unless it is the head."""
        total = sum(p.nbytes for p in self.language_model.parameters())
        tied = self.language_model.config.tie_word_embeddings
        return total if tied else total - self.embedding.weight.nbytes


def cache_bytes(cache: Any) -> int:
    """Bytes of a state or cache, ours or transformers'."""
    if isinstance(cache, MambaState):
        return cache.nbytes
    tensors = (x for layer in cache.layers for x in vars(layer).values() if torch.is_tensor(x))
    return sum(x.nbytes for x in tensors)
