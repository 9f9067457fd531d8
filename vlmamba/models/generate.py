"""What generate() of transformers asks of a model with a Mamba state and pictures in its prompt.

Pictures have no batch dimension: (n, ...) tensors fill the `<image>` tokens of all rows in reading
order.  Where generate() repeats rows (beams, several answers), each row takes its own pictures
along; behind the prompt they are not shown again, for the state has seen them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin

from vlmamba.models.language import Cache, LanguageModel

PICTURES = ("pixel_values", "image_features")


class MambaGenerationMixin(GenerationMixin):
    """generate()'s hooks: rows and their pictures, the state in place of a cache, long prompts."""

    if TYPE_CHECKING:  # what the model brings
        embed: Callable[..., tuple[Tensor, Tensor | None]]
        images_per_row: Callable[..., list[int]]
        language_model: LanguageModel
        _image_tokens: Callable[[Tensor | None, Tensor | None], Tensor]
        __call__: Callable[..., Any]

    def prepare_inputs_for_generation(  # type: ignore[override]  # all but the ids come by name
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache_params: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the next forward pass is given: not again what the state has seen.

        Raises ValueError for a prompt without a token.
        """
        seen = 0 if cache_params is None else cache_params.get_seq_length()
        length = input_ids.shape[1]
        if is_first_iteration:
            length = length if inputs_embeds is None else inputs_embeds.shape[1]
            _check_prompts(length, attention_mask)
        elif seen:
            for name in PICTURES:
                kwargs.pop(name, None)
        elif inputs_embeds is not None and attention_mask is not None:
            # no state is kept: the prompt's embeddings come again
            new = input_ids[:, inputs_embeds.shape[1] - attention_mask.shape[1] :]
            pictured = self._image_tokens(None, inputs_embeds).any(dim=1)
            words = self.language_model.embed(new, pictured)
            inputs_embeds = torch.cat([inputs_embeds, words], dim=1)
            is_first_iteration = True
        if next_sequence_length is None and inputs_embeds is not None and 0 < seen < length:
            next_sequence_length = length - seen  # embeddings are always the whole sequence's
        return super().prepare_inputs_for_generation(  # type: ignore[misc]  # typed by a protocol
            input_ids,
            next_sequence_length,
            cache_params=cache_params,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Every row `expand_size` times, with its own pictures and its own state."""
        own: dict[str, Any] = {}
        if expand_size > 1:
            state = kwargs.pop("cache_params", None)
            if state is not None:
                rows = torch.arange(state.batch)
                own["cache_params"] = state.select(rows.repeat_interleave(expand_size))
            for name in PICTURES:
                pictures = kwargs.pop(name, None)
                if pictures is not None:
                    embeds = kwargs.get("inputs_embeds")
                    seen = 0 if state is None or embeds is not None else state.get_seq_length()
                    counts = self._images_per_row_of(input_ids, embeds, len(pictures), seen)
                    own[name] = _repeated(pictures, counts, expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, cast(torch.LongTensor, input_ids), **kwargs
        )
        return input_ids, kwargs | own

    def _images_per_row_of(
        self, ids: Tensor | None, embeds: Tensor | None, pictures: int, seen: int
    ) -> list[int]:
        """Of a whole sequence's ids, of which a state has seen some, or of the new ones alone."""
        if ids is not None and 0 < seen < ids.shape[1]:
            with contextlib.suppress(ValueError):
                return self.images_per_row(ids[:, seen:], embeds, pictures)
        return self.images_per_row(ids, embeds, pictures)

    def _prefill(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """The prompt in one pass, or in pieces of `prefill_chunk_size` tokens.

        Pictures and words are embedded at once, so that a piece may end inside a picture.
        """
        input_ids = _not_seen(input_ids, generation_config, model_kwargs)
        size = generation_config.prefill_chunk_size
        if size is None:
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, is_first_iteration
            )
        inputs = self.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **model_kwargs
        )
        names = ("input_ids", *PICTURES, "inputs_embeds")
        cache = inputs.get("cache_params")
        before = None if cache is None else cache.pictured
        embeds, _ = self.embed(*(inputs.pop(name, None) for name in names), before)
        keeps_state = inputs.pop("use_cache", True) or inputs.get("cache_params") is not None
        output = self._pass_in_pieces(embeds, size, **inputs)
        if not keeps_state:
            output["cache_params"] = None
        return output

    def _pass_in_pieces(
        self,
        embeds: Tensor,
        size: int,
        attention_mask: Tensor | None = None,
        cache_params: Cache | None = None,
        **options: Any,
    ) -> Any:
        """forward's output for the last piece, its logits after each row's last real token."""
        if attention_mask is None:
            attention_mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
        masks = attention_mask[:, -embeds.shape[1] :].split(size, dim=1)
        options |= {"logits_to_keep": 1, "return_dict": True, "use_cache": True}
        logits: Tensor | None = None
        for piece, mask in zip(embeds.split(size, dim=1), masks, strict=True):
            output = self(
                inputs_embeds=piece, attention_mask=mask, cache_params=cache_params, **options
            )
            cache_params = output.cache_params
            goes_on = mask.any(dim=1)[:, None, None]
            logits = output.logits if logits is None else output.logits.where(goes_on, logits)
        output["logits"] = logits
        return output

    def _prepare_cache_for_generation(  # type: ignore[override]  # nobody reads a result
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """The first forward pass makes the state, nothing to prepare."""
        if model_kwargs.get("cache_params") is not None:
            model_kwargs["cache_params"]._is_user_defined = True


def _not_seen(ids: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> Any:
    """The ids without those that a given state has seen, where they are the whole sequence's.

    As in transformers: they are where the mask is as long as they are, and else the new ones alone.
    """
    state, mask = model_kwargs.get("cache_params"), model_kwargs.get("attention_mask")
    length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
    seen = 0 if state is None else state.get_seq_length()
    return ids[:, seen:] if length == ids.shape[1] and 0 < seen < length else ids


def _check_prompts(length: int, mask: Tensor | None) -> None:
    if length == 0:
        raise ValueError("the prompt holds no token; expected at least one")
    if mask is not None and not bool((mask != 0).any(dim=1).all()):
        row = int((mask != 0).any(dim=1).int().argmin())
        raise ValueError(f"row {row} of the prompts is all padding; expected at least one token")


def _repeated(pictures: Tensor, counts: list[int], times: int) -> Tensor:
    """Each row's pictures `times` times: rows [a b] [c], twice -> a b a b c c."""
    blocks = pictures.split(counts)
    return torch.cat([block for block in blocks for _ in range(times)])
