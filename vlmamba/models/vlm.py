"""VL-Mamba: vision encoder -> connector -> language model.

`V_img = f_V(I);  V_out = connector(V_img);  R = f_L(V_out, f_T(Q))`  (VL-Mamba, section 3).
The image's vectors stand where the prompt has `<image>` tokens.  A transformers model: it loads
and saves with from_pretrained / save_pretrained and generates with generate().
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import ModelOutput

from vlmamba import model_card
from vlmamba.config import VLMambaConfig
from vlmamba.models import low_rank
from vlmamba.models.adapter import merge, pending
from vlmamba.models.connector import OutputLinear, build_connector
from vlmamba.models.generate import MambaGenerationMixin
from vlmamba.models.language import Cache, build_language_model
from vlmamba.models.language.base import EMBEDDING_STD
from vlmamba.models.low_rank import LowRankSettings
from vlmamba.models.mixers.base import Layer
from vlmamba.models.quantized import QuantizedLinear, quantize
from vlmamba.models.vision import build_vision_encoder


@dataclass
class VLMambaOutput(ModelOutput):
    """loss: scalar, mean over supervised tokens.  logits: (B, L or kept, vocabulary) float32.

    cache_params: the state after the last real token of each row.
    hidden_states: embeddings, then every layer's output, the last one normed; with a list of
    indices as output_hidden_states, None in place of the others.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache_params: Cache | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    image_hidden_states: Tensor | None = None


class VLMambaPreTrainedModel(PreTrainedModel):
    """Initialization and the declarations that transformers asks of a model."""

    config: VLMambaConfig
    config_class = VLMambaConfig
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = _supports_flash_attn = True  # of the vision encoder; nothing else attends
    _no_split_modules = ["MambaBlock"]  # noqa: RUF012  # of another family: its own, see __init__

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mamba's published initialization (state-spaces/mamba, `_init_weights` and the mixer)."""
        if isinstance(module, Layer):
            module.initialize(self.config.n_layer)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, OutputLinear):
            init.normal_(module.weight, std=EMBEDDING_STD / math.sqrt(module.in_features))
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear | nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):  # timm's, which no file holds
            cast(Any, module).init_non_persistent_buffers()


class VLMambaForConditionalGeneration(VLMambaPreTrainedModel, MambaGenerationMixin):
    """The whole model.  Parts: vision_encoder, connector, language_model."""

    if TYPE_CHECKING:
        # GenerationMixin types `self` as a protocol that transformers' own models do not meet
        generate: Callable[..., Any]

    def __init__(self, config: VLMambaConfig):
        super().__init__(config)
        self.vision_encoder = build_vision_encoder(config)
        self.connector = build_connector(config)
        self.language_model = build_language_model(config.text_config)
        self._tied_weights_keys = {
            f"language_model.{copy}": f"language_model.{original}"
            for copy, original in self.language_model.tied_weights.items()
        }
        self._no_split_modules = list(self.language_model.block_names)
        if not self.vision_encoder.weights_in_checkpoint:
            self._keys_to_ignore_on_save = [
                f"vision_encoder.{name}" for name in self.vision_encoder.state_dict()
            ]
            self._keys_to_ignore_on_load_missing = [r"^vision_encoder\."]
        self.post_init()
        if config.quantized:
            quantize(self.language_model, config.quantized)
            self.untie_packed()
        if config.low_rank:
            low_rank.add(self.language_model, LowRankSettings.read(config.low_rank))

    def initialize_weights(self) -> None:
        """As in transformers; then, of what no file has filled, what is a copy of another part."""
        super().initialize_weights()
        self.language_model.initialize_copies()

    def untie_packed(self) -> None:
        """Forget the ties of what is packed: a head of whole numbers is no copy of the embedding.

        transformers keeps them in the model and once more in a wrapped one of its own.
        """
        for part in self.modules():
            if isinstance(part, PreTrainedModel):
                layers = part.named_modules()
                packed = {f"{n}.weight" for n, m in layers if isinstance(m, QuantizedLinear)}
                for name in ("_tied_weights_keys", "all_tied_weights_keys"):
                    ties = getattr(part, name) or {}
                    setattr(part, name, {k: v for k, v in ties.items() if k not in packed})

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with a README card where there is none: that of the folder that the
        model was loaded from, or a new one.
        """
        main_process = args[0] if args else kwargs.get("is_main_process", True)
        if main_process and not Path(save_directory).is_file():
            model_card.keep_card(self.name_or_path or "", save_directory)
            model_card.write_card(save_directory, self.config)
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this package's modules into what is saved."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        adapter: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; an encoder that checkpoints leave out is loaded from its package.

        A LoRA run's training checkpoint gets its adapter added, unless `adapter` is False.
        """
        source = pretrained_model_name_or_path
        kwargs.setdefault("key_mapping", {r"^lm_head\.": "language_model.lm_head."})  # older files
        loaded = super().from_pretrained(source, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model.vision_encoder.weights_in_checkpoint:
            model.vision_encoder.load_pretrained()
        if adapter and source is not None and (found := pending(Path(source))) is not None:
            merge(model, found)
        return loaded

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.language_model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.language_model.embedding = cast(nn.Embedding, value)

    def get_output_embeddings(self) -> nn.Linear:
        """The output head (shares its weight with the token embedding)."""
        return cast(nn.Linear, self.language_model.lm_head)

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output head."""
        self.language_model.lm_head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers; copies of the embedding and the head that learn apart follow."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        self.language_model.resize_copies()
        return cast(nn.Embedding, resized)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(n_images, 3, H, W) -> (n_images, P, Dv): the encoder's patches.

        A frozen encoder makes no graph, whatever hooks ask its inputs for one.
        """
        trainable = any(p.requires_grad for p in self.vision_encoder.parameters())
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and (trainable or pixel_values.requires_grad)
        ):
            return self.vision_encoder(pixel_values.to(self.dtype))

    def embed(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Token embeddings (B, L, D) with the images' vectors in place; and those (n, P, D).

        Tokens come as ids or as their embeddings, which are taken as they are.  Images fill the
        `<image>` tokens of the batch in reading order.  before: (B,) bool, which rows' state holds
        an image already (`Cache.pictured`).  Raises ValueError where the number of images and that
        of such tokens disagree, images without tokens and tokens without images included.  A batch
        without images runs a connector that learns on an empty image and adds nothing of it: where
        several processes train, each must give every parameter a gradient, whatever its batch
        holds.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("give pixel_values or image_features, not both")
        given = image_features if pixel_values is None else pixel_values
        self.images_per_row(input_ids, inputs_embeds, 0 if given is None else len(given))
        pictured, embeds = before, inputs_embeds
        if given is not None:
            where = self._image_tokens(input_ids, inputs_embeds)
            pictured = where.any(dim=1) if before is None else where.any(dim=1) | before
        if embeds is None:
            embeds = self.language_model.embed(cast(Tensor, input_ids), pictured)
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        if image_features is None or pictured is None:
            if self.training and any(p.requires_grad for p in self.connector.parameters()):
                embeds = embeds + 0.0 * self.connector(self._empty_image()).sum()
            return embeds, None
        images = self.connector(image_features.to(self.dtype))
        embeds = embeds.masked_scatter(where.unsqueeze(-1), images.to(embeds.dtype))
        return self.language_model.mark_pictured(embeds, pictured), images

    def images_per_row(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, images: int
    ) -> list[int]:
        """How many of the batch's images each of its B rows has places for.

        Raises ValueError unless the rows' `<image>` tokens are those of `images` whole images.
        """
        per_image = self.config.num_image_tokens
        tokens = self._image_tokens(input_ids, inputs_embeds).sum(dim=1).tolist()
        if sum(tokens) != images * per_image or any(count % per_image for count in tokens):
            shown = f"{images} images of {per_image} tokens each" if images else "no images"
            raise ValueError(
                f"the batch holds {sum(tokens)} image tokens but {shown}; let VLMambaProcessor "
                "expand <image>, one tag for each picture, in the picture's row"
            )
        return [count // per_image for count in tokens]

    def _image_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """(B, L) bool: where images belong, by id, or by the embedding of that id."""
        if inputs_embeds is None:
            assert input_ids is not None  # one of the two is given
            return input_ids.eq(self.config.image_token_id)
        id_ = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        embedding = self.get_input_embeddings()(id_)
        inputs_embeds = inputs_embeds[..., : len(embedding)]  # without a mark of rows
        return (inputs_embeds == embedding.to(inputs_embeds)).all(dim=-1)

    def _empty_image(self) -> Tensor:
        """Features (1, P, Dv) of zeros."""
        shape = (1, self.config.num_patches, self.config.vision_width)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cache_params: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> VLMambaOutput | tuple:
        """One pass over (B, L) tokens, from the start or continuing `cache_params`.

        attention_mask (B, L) may have its zeros anywhere; a row's answer never depends on them.
        With logits_to_keep=1 the logits (B, 1, V) are those after each row's last real token.
        labels (B, L): -100 is not supervised.  In training mode with labels only the loss is
        computed, at the supervised positions: the mean over them, or with num_items_in_batch (the
        supervised tokens of a batch that is given in parts) their sum over that number; logits
        come with it where output_logits asks for them.
        image_features (n, P, Dv) stand in for pixel_values (cached features, blind runs).
        Raises ValueError where images and `<image>` tokens disagree (see `embed`); one token that
        continues a state is exempt, for a sampled one may be any.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        use_cache = not self.training if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        images = None
        before = None if cache_params is None else cache_params.pictured
        sampled = cache_params is not None and input_ids is not None and input_ids.shape[1] == 1
        if sampled and pixel_values is None and image_features is None:
            inputs_embeds = self.language_model.embed(cast(Tensor, input_ids), before)
        else:
            inputs_embeds, images = self.embed(
                input_ids, pixel_values, image_features, inputs_embeds, before
            )
        if attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]
        collected: list[Tensor] | None = None if output_hidden_states in (None, False) else []
        hidden, state = self._run(inputs_embeds, attention_mask, cache_params, collected)

        loss = None
        if labels is not None:
            loss = self._loss(hidden, labels, attention_mask, num_items_in_batch)
        logits = None
        if labels is None or not self.training or output_logits:
            logits = self._logits(_keep(hidden, attention_mask, logits_to_keep))
        if cache_params is not None:
            cache_params.write(state)
            state = cache_params
        output = VLMambaOutput(
            loss=loss,
            logits=logits,
            cache_params=state if use_cache or cache_params is not None else None,
            hidden_states=_chosen(
                collected, self.language_model.bare(hidden), output_hidden_states
            ),
            image_hidden_states=images,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _run(
        self,
        embeds: Tensor,
        mask: Tensor | None,
        state: Cache | None,
        collected: list[Tensor] | None,
    ) -> tuple[Tensor, Cache]:
        """The language model, with padding of any shape turned into right padding and back."""
        if mask is None or bool(mask.all()):
            if embeds.shape[1] == 1 and state is not None and not torch.is_grad_enabled():
                return self._run_step(embeds, state, collected)
            return self.language_model(embeds, state, None, collected)
        order = (mask == 0).int().argsort(dim=1, stable=True)  # real tokens first
        lengths = (mask != 0).sum(dim=1)
        packed = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
        hidden, new_state = self.language_model(packed, state, lengths, collected)
        back = order.argsort(dim=1).unsqueeze(-1)
        if collected is not None:
            collected[:] = [x.gather(1, back.expand_as(x)) for x in collected]
        return hidden.gather(1, back.expand_as(hidden)), new_state

    def _run_step(
        self, embeds: Tensor, state: Cache, collected: list[Tensor] | None
    ) -> tuple[Tensor, Cache]:
        if collected is not None:
            return self.language_model(embeds, state, None, collected)
        return self.language_model.step(embeds[:, 0], state)[:, None], state

    def _logits(self, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, V) float32; a token of each row as a step computes it, (B, D)."""
        if hidden.shape[1] == 1:
            return self.language_model.head(hidden[:, 0]).float().unsqueeze(1)
        return self.language_model.head(hidden).float()

    def _loss(
        self, hidden: Tensor, labels: Tensor, mask: Tensor | None, items: Tensor | int | None
    ) -> Tensor:
        """Mean cross-entropy over supervised tokens; logits are made at their positions only.

        A label is predicted from the real token before it, also where padding stands between: what
        comes out at padding has seen the whole row (`_run`).  A row's first token has none before
        it and is not supervised, padded or not.
        items: what the sum is divided by, in place of the number of these tokens.
        """
        targets = labels[:, 1:]
        supervised = targets != -100
        if mask is None:
            before = hidden[:, :-1][supervised]
        else:
            places = torch.arange(targets.shape[1], device=targets.device)
            last = torch.where(mask[:, :-1] != 0, places, -1).cummax(dim=1).values
            supervised = supervised & (last >= 0)
            before = hidden[supervised.nonzero(as_tuple=True)[0], last[supervised]]
        logits = self.language_model.head(before).float()
        total, count = F.cross_entropy(logits, targets[supervised], reduction="sum"), len(logits)
        if (added := self.language_model.auxiliary_loss()) is not None:
            total = total + count * added
        divisor = count if items is None else items
        return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor)

    def init_state(self, batch: int) -> Cache:
        """The state before the first token, on the model's device and in its dtype."""
        return self.language_model.new_cache(batch)


def _chosen(
    collected: list[Tensor] | None, last: Tensor, wanted: bool | list[int] | None
) -> tuple[Tensor | None, ...] | None:
    """The hidden states, None where a list of indices leaves one out."""
    if collected is None:
        return None
    states = (*collected, last)
    if not isinstance(wanted, list | tuple):
        return states
    kept = {index % len(states) for index in wanted}
    return tuple(state if n in kept else None for n, state in enumerate(states))


def _keep(hidden: Tensor, mask: Tensor | None, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted; "the last one" means each row's last real token."""
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    if logits_to_keep == 1 and mask is not None:
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * (mask != 0)).argmax(dim=1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last].unsqueeze(1)
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden


AutoModel.register(VLMambaConfig, VLMambaForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VLMambaConfig, VLMambaForConditionalGeneration, exist_ok=True)
