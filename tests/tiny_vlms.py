"""Tiny transformers VLMs with random weights, saved as their authors' folders are: no network.

folder = save("llava", tmp_path)      # llava, qwen2_vl, idefics3, paligemma, mllama, blip2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

END, BOS, PAD = "<eos>", "<bos>", "<pad>"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
SIZE = 56  # pixels; 4 x 4 patches
NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
SENTENCES = ("Is there a dog in the image? yes no", "Answer with the option's letter: A B C D")

CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer(*special: str, **named: str) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE that puts BOS in front; `special` are tokens of their own.

    named: those that the tokenizer knows by a name, such as image_token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[PAD, BOS, END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    found = hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=named,
    )
    found.add_special_tokens({"additional_special_tokens": list(special)})
    return found


def llava(text: Any = hf.LlamaConfig, **more: Any) -> tuple[nn.Module, Any]:
    """LLaVA-1.5: CLIP of fixed size, a Llama (or another `text` configuration)."""
    words = tokenizer("<image>")
    processor = hf.LlavaProcessor(
        image_processor=hf.CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>\n"),
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=SIZE),
        text_config=text(**TEXT | more, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[nn.Module, Any]:
    """Qwen2-VL: images of any size, positions of three dimensions."""
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    words = tokenizer(*special)
    sizes = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    processor = hf.Qwen2VLProcessor(
        image_processor=hf.Qwen2VLImageProcessor(**sizes),
        tokenizer=words,
        video_processor=hf.Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    start, end, image, video = words.convert_tokens_to_ids(list(special))
    config = hf.Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return hf.Qwen2VLForConditionalGeneration(config), processor


def idefics3() -> tuple[nn.Module, Any]:
    """Idefics3, the plan of SmolVLM: an image in tiles of its own number, a Llama."""
    tiles = [f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)]
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    words = tokenizer(*special, *tiles)
    processor = hf.Idefics3Processor(
        image_processor=hf.Idefics3ImageProcessor(
            size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE}, **NORMAL
        ),
        tokenizer=words,
        image_seq_len=4,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(words)).to_dict(),
        vision_config={**VISION, "image_size": SIZE},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def paligemma() -> tuple[nn.Module, Any]:
    """PaliGemma: the image's tokens see the question, so that no prefix can be shared."""
    words = tokenizer("<image>")
    processor = hf.PaliGemmaProcessor(
        image_processor=hf.SiglipImageProcessor(
            size={"height": SIZE, "width": SIZE}, image_seq_length=16
        ),
        tokenizer=words,
    )
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, head_dim=8, vocab_size=len(words)).to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=SIZE).to_dict(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
        vocab_size=len(words),
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def mllama() -> tuple[nn.Module, Any]:
    """Llama-3.2-Vision: pictures are no part of the text, layers of their own look at them."""
    words = tokenizer("<|image|>", image_token="<|image|>")
    processor = hf.MllamaProcessor(
        image_processor=hf.MllamaImageProcessor(
            size={"height": SIZE, "width": SIZE}, max_image_tiles=2
        ),
        tokenizer=words,
        chat_template=CHAT.replace("IMAGE", "<|image|>"),
    )
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "patch_size": 14,
            "image_size": SIZE,
            "max_num_tiles": 2,
            "vision_output_dim": 48,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **TEXT,
            "num_hidden_layers": 3,
            "cross_attention_layers": [1],
            "vocab_size": len(words),
            "pad_token_id": words.pad_token_id,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=words.convert_tokens_to_ids("<|image|>"),
    )
    return hf.MllamaForConditionalGeneration(config), processor


def blip2() -> tuple[nn.Module, Any]:
    """BLIP-2: its processor puts four image tokens in front of every text, whatever it says."""
    words = tokenizer("<image>")
    processor = hf.Blip2Processor(
        image_processor=hf.BlipImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer=words,
        num_query_tokens=4,
    )
    config = hf.Blip2Config(
        vision_config={**VISION, "image_size": SIZE},
        qformer_config={**VISION, "encoder_hidden_size": 24, "vocab_size": 50},
        text_config={
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": len(words),
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 512,
        },
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return hf.Blip2ForConditionalGeneration(config), processor


def instructblip() -> tuple[nn.Module, Any]:
    """InstructBLIP on T5: its generate() returns the answer alone, though no encoder-decoder."""
    words = tokenizer("<image>")
    processor = hf.InstructBlipProcessor(
        image_processor=hf.BlipImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer=words,
        qformer_tokenizer=tokenizer(),
        num_query_tokens=4,
    )
    config = hf.InstructBlipConfig(
        vision_config={**VISION, "image_size": SIZE},
        qformer_config={**VISION, "encoder_hidden_size": 24, "vocab_size": 400},
        text_config={
            "model_type": "t5",
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": len(words),
            "decoder_start_token_id": words.pad_token_id,
        },
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return hf.InstructBlipForConditionalGeneration(config), processor


def blip() -> tuple[nn.Module, Any]:
    """BLIP: its generate() goes on from the prompt without its last token."""
    words = tokenizer()
    processor = hf.BlipProcessor(
        image_processor=hf.BlipImageProcessor(size={"height": SIZE, "width": SIZE}),
        tokenizer=words,
    )
    text = {
        "hidden_size": 32,
        "encoder_hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(words),
        "bos_token_id": words.bos_token_id,
        "sep_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    vision = {**VISION, "image_size": SIZE, "num_hidden_layers": 2}
    config = hf.BlipConfig(vision_config=vision, text_config=text)
    return hf.BlipForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "idefics3": idefics3,
    "paligemma": paligemma,
    "mllama": mllama,
    "blip2": blip2,
    "instructblip": instructblip,
    "blip": blip,
}


def save(
    family: str, folder: Path, generation: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """A folder with the model and its processor, weights large enough for varied answers."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family](**options)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.2)
        elif name.endswith("_gate"):  # zero in a new model: its pictures would change nothing
            nn.init.constant_(parameter, 0.5)
    words = processor.tokenizer
    model.generation_config = hf.GenerationConfig(
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **generation or {},
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
