"""Published Mamba VLMs: files in their exact key layout load whole, and logits are the authors'.

What is expected is computed here from their equations with timm's and transformers' own modules.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from tiny import tiny_config
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from harness.models.vlmamba import VLMambaModel
from vlmamba import VLMambaConfig, VLMambaForConditionalGeneration, ask, checkpoints
from vlmamba.configs.vlms import VLM_PRESETS
from vlmamba.convert import __main__ as command
from vlmamba.generation import GroupedGenerator, Request
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError

QUESTION = "Is there a cat?"
PICTURE = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 9).convert("RGB")
TOLERANCE = 1e-4
SIDE, PATCH = 28, 14


def random_weights(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", ".D", "dt_bias")):
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, trained_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained_tokenizer.save_pretrained(folder)
    return folder


def convert(*words: object) -> int:
    return command.main([str(word) for word in words])


def converted(folder: Path, *words: object):
    """The checkpoint that the command makes, loaded."""
    assert convert(*words, "--out", folder) == 0
    return checkpoints.load(str(folder))


def our_logits(model, processor) -> torch.Tensor:
    """(L, V) of the prompt of one question about one picture, in transformers' way."""
    prompt = processor.conversation_prompt(QUESTION)
    inputs = processor(text=[prompt], images=[PICTURE], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == processor.encode(prompt)
    with torch.inference_mode():
        return model(**inputs).logits[0]


def test_presets_have_the_published_sizes():
    """Cobra calls itself 3.5B; the pair differ in the language model alone (paper, section 3)."""
    sizes = {}
    for name in VLM_PRESETS:
        config = VLMambaConfig.preset(name)
        with torch.device("meta"):
            model = VLMambaForConditionalGeneration(config)
        sizes[name] = sum(p.numel() for p in model.language_model.parameters()), config
    assert sizes["cobra-3b"][0] == 2_768_345_600  # state-spaces/mamba-2.8b
    assert sizes["pythia-vl-2.8b"][0] == 2_775_208_960  # EleutherAI/pythia-2.8b
    assert sizes["pythia-vl-1b"][0] == 1_011_781_632  # EleutherAI/pythia-1b
    assert {sizes[name][1].num_image_tokens for name in sizes} == {27 * 27, 24 * 24}


def test_a_published_preset_takes_no_further_part():
    with pytest.raises(UserError, match="unknown language model preset 'cobra-3b'"):
        VLMambaConfig.preset("cobra-3b+mlp")


# --- Cobra


def dino(side: int) -> VisionTransformer:
    return VisionTransformer(
        img_size=side,
        patch_size=PATCH,
        embed_dim=128,
        depth=3,
        num_heads=2,
        init_values=1e-5,
        reg_tokens=4,
        no_embed_class=True,
        num_classes=0,
    ).eval()


def siglip() -> VisionTransformer:
    return VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=144,
        depth=3,
        num_heads=2,
        mlp_ratio=3.7362,
        class_token=False,
        global_pool="map",
        num_classes=0,
    ).eval()


def mamba(d_model: int = 32) -> MambaForCausalLM:
    """transformers' own, whose names differ from state-spaces' in the embedding's alone."""
    config = MambaConfig(
        vocab_size=320, hidden_size=d_model, num_hidden_layers=2, pad_token_id=0, eos_token_id=0
    )
    return random_weights(MambaForCausalLM(config))


def original_names(model: MambaForCausalLM | Mamba2ForCausalLM) -> dict[str, torch.Tensor]:
    """state-spaces' layout."""
    return {
        key.replace("embeddings.weight", "embedding.weight"): tensor.clone()
        for key, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def timm_encoders(tmp_path_factory):
    """Folders of timm's DINOv2, published at twice the resolution, and SigLIP; and the models."""
    torch.manual_seed(2)
    home = tmp_path_factory.mktemp("timm")
    published, other = random_weights(dino(2 * SIDE)), random_weights(siglip())
    for name, model in (("dinov2", published), ("siglip", other)):
        (home / name).mkdir()
        weights = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(weights, home / name / "model.safetensors")
    resized = dino(SIDE)
    resized.load_state_dict(checkpoint_filter_fn(published.state_dict(), resized))
    flags = [f"--encoder=dinov2={home / 'dinov2'}", f"--encoder=siglip={home / 'siglip'}"]
    return SimpleNamespace(dino=resized, siglip=other, flags=flags)


def prismatic_features(encoders, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
    """Second to last blocks' patches side by side (cobra, `dinosiglip_vit.py`)."""
    of_each = []
    for name in ("dino", "siglip"):
        model = getattr(encoders, name)
        (patches,) = model.get_intermediate_layers(pixels[name], n={len(model.blocks) - 2})
        of_each.append(patches)
    return torch.cat(of_each, dim=2)


def split_pixels(processor) -> dict[str, torch.Tensor]:
    """What each encoder is shown of the picture."""
    pixels = processor.pixel_values([PICTURE]).view(1, 2, 3, SIDE, SIDE)
    return {"dino": pixels[:, 0], "siglip": pixels[:, 1]}


def projector(d_in: int, d_out: int) -> torch.nn.Sequential:
    """`fused-gelu-mlp`."""
    wide = [torch.nn.Linear(d_in, 4 * d_in), torch.nn.GELU(), torch.nn.Linear(4 * d_in, d_out)]
    return random_weights(
        torch.nn.Sequential(*wide, torch.nn.GELU(), torch.nn.Linear(d_out, d_out))
    )


@pytest.fixture
def cobra(tmp_path):
    """A run folder of Cobra, and its parts."""
    language, mlp = mamba(), projector(128 + 144, 32)
    parts = {
        "projector": {f"projector.{key}": t for key, t in mlp.state_dict().items()},
        "llm_backbone": {f"llm.{key}": t for key, t in original_names(language).items()},
    }
    folder = tmp_path / "cobra+3b"
    (folder / "checkpoints").mkdir(parents=True)
    file = folder / "checkpoints" / "latest-checkpoint.pt"
    torch.save({"model": parts}, file)
    settings = {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-384px",
        "llm_backbone_id": "mamba-2.8b-zephyr",
        "image_resize_strategy": "resize-naive",
    }
    (folder / "config.json").write_text(json.dumps({"model": settings}))
    return SimpleNamespace(folder=folder, file=file, parts=parts, mlp=mlp, language=language)


@pytest.fixture
def cobra_words(cobra, timm_encoders, tokenizer_folder):
    return ["cobra", cobra.folder, *timm_encoders.flags, "--tokenizer", tokenizer_folder]


def test_cobra_computes_what_its_authors_compute(cobra, cobra_words, timm_encoders, tmp_path):
    model, processor = converted(tmp_path / "ours", *cobra_words)
    text = f"<|user|>\n{QUESTION}<|endoftext|>\n<|assistant|>\n"
    assert processor.conversation_prompt(QUESTION) == "<image>" + text
    features = prismatic_features(timm_encoders, split_pixels(processor))
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    words = cobra.language.get_input_embeddings()(ids)
    expected = cobra.language(inputs_embeds=torch.cat([cobra.mlp(features), words], 1)).logits[0]
    found = our_logits(model, processor)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1  # a difference would show


def test_a_converted_folder_is_evaluated_asked_and_trained(cobra_words, tmp_path, capsys):
    model, processor = converted(tmp_path / "ours", *cobra_words)
    request = Request(processor.conversation_prompt(QUESTION), "a", PICTURE)
    (grouped,) = GroupedGenerator(model, processor).generate([request], 5)
    inputs = processor(text=[request.prompt], images=[PICTURE], return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    new = made[0, inputs["input_ids"].shape[1] :]
    assert processor.tokenizer.decode(new, skip_special_tokens=True).strip() == grouped
    evaluated = VLMambaModel(str(tmp_path / "ours"), device="cpu")
    assert evaluated.provenance()["image_aspect_ratio"] == "resize"
    PICTURE.save(tmp_path / "picture.png")
    words = [str(tmp_path / "picture.png"), QUESTION, "--model", str(tmp_path / "ours")]
    capsys.readouterr()
    assert ask.main([*words, "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == grouped
    config = checkpoints.read_config(str(tmp_path / "ours"))
    start, _ = initial_model(config, STAGES["finetune"], str(tmp_path / "ours"), [], 0)
    ours = model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in start.state_dict().items())


def test_cobra_prompts_follow_its_prompt_builder(cobra_words, tmp_path):
    """ZephyrChatPromptBuilder: pictures first, a line break before every later question."""
    _, processor = converted(tmp_path / "ours", *cobra_words)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " one? "}]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "two?<image>"},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "<image><image><|user|>\none?<|endoftext|>\n<|assistant|>\nyes<|endoftext|>"
        "\n<|user|>\ntwo?<|endoftext|>\n<|assistant|>\n"
    )


def test_pictures_are_what_timm_shows_the_encoders(cobra_words, tmp_path):
    """`resize-naive`: bicubic to the square; torchvision's rounding is left."""
    _, processor = converted(tmp_path / "ours", *cobra_words)
    means = {
        "dino": timm.data.constants.IMAGENET_DEFAULT_MEAN,
        "siglip": timm.data.constants.IMAGENET_INCEPTION_MEAN,
    }
    stds = {
        "dino": timm.data.constants.IMAGENET_DEFAULT_STD,
        "siglip": timm.data.constants.IMAGENET_INCEPTION_STD,
    }
    square = PICTURE.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    raw = torch.tensor(list(square.getdata())).view(SIDE, SIDE, 3).permute(2, 0, 1) / 255
    for name, pixels in split_pixels(processor).items():
        mean, std = (torch.tensor(t[name]).view(3, 1, 1) for t in (means, stds))
        assert (pixels[0] - (raw - mean) / std).abs().max() < 2 / 255 / std.min()


def break_cobra(cobra, how: str) -> str:
    """Damage the file; the words of the error."""
    parts = cobra.parts
    key = "llm.backbone.layers.1.mixer.out_proj.weight"
    if how == "missing":
        del parts["llm_backbone"][key]
        said = f"lacks 1 tensors: llm_backbone.{key}"
    elif how == "unexpected":
        parts["projector"]["projector.6.weight"] = torch.zeros(2)
        said = "has unexpected 1 tensors: projector.projector.6.weight"
    elif how == "shape":
        parts["projector"]["projector.2.bias"] = torch.zeros(7)
        said = r"projector.projector.2.bias has shape \(7,\); the model's part is \(32,\)"
    elif how == "nan":
        parts["llm_backbone"][key][0, 0] = float("nan")
        said = f"llm_backbone.{key} holds NaN or infinite values"
    elif how == "part":
        parts["mlp"] = {}
        said = "has unexpected parts: mlp"
    elif how == "head":
        parts["llm_backbone"]["llm.lm_head.weight"] = torch.zeros(320, 32)
        said = "lm_head.weight differs from"
    elif how == "code":
        parts["projector"]["run"] = Path("x")
        said = "not a file of plain tensors"
    else:
        raise AssertionError(how)
    torch.save({"model": parts}, cobra.file)
    return said


BROKEN = ("missing", "unexpected", "shape", "nan", "part", "head", "code")


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_refused_in_one_line(how, cobra, cobra_words, tmp_path, capsys):
    said = break_cobra(cobra, how)
    assert convert(*cobra_words, "--out", tmp_path / "ours") == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert not list(tmp_path.glob("ours*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kobra"], "unknown system 'kobra'; known, nearest first: cobra"),
        (["--encoder", "clip=x"], "unknown encoder of cobra 'clip'"),
        (["--encoder", "clip"], "expected NAME=FOLDER_OR_ID"),
        (["--out", "."], "is there already"),
        (["nowhere"], "cannot fetch the cobra 'nowhere'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    words, said, cobra_words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [*map(str, cobra_words), "--out", "ours", *words]
    if len(words) == 1:
        given[0 if words == ["kobra"] else 1] = words[0]
        given = given[:-1]
    assert command.main(given) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_another_architecture_is_refused(cobra, cobra_words, tmp_path, capsys):
    settings = {"model": {"arch_specifier": "no-align+fused-ldpnet"}}
    (cobra.folder / "config.json").write_text(json.dumps(settings))
    assert convert(*cobra_words, "--out", tmp_path / "ours") == 2
    assert "arch_specifier is 'no-align+fused-ldpnet'" in capsys.readouterr().err


# --- ML-Mamba


def mamba2(weights: dict[str, torch.Tensor], x: torch.Tensor, way: str) -> torch.Tensor:
    """One direction before the output projection, token by token (Dao and Gu, 2405.21060).

    way: "" or "_b", whose convolution, steps, decays and skips are its own.
    """
    d_inner, heads = weights["norm.weight"].shape[0], weights["dt_bias"].shape[0]
    states = (weights["conv1d.weight"].shape[0] - d_inner) // 2
    projected = x @ weights["in_proj.weight"].T
    z, rows, steps = projected.split([d_inner, d_inner + 2 * states, heads], dim=-1)
    kernel, bias = weights[f"conv1d{way}.weight"], weights[f"conv1d{way}.bias"]
    padded = F.pad(rows.T, (kernel.shape[-1] - 1, 0))[None]
    rows = F.silu(F.conv1d(padded, kernel, bias, groups=len(kernel)))[0].T
    values, b, c = rows.split([d_inner, states, states], dim=-1)
    values = values.unflatten(-1, (heads, -1))
    steps = F.softplus(steps + weights[f"dt_bias{way}"])
    decay = torch.exp(-steps * weights[f"A_log{way}"].exp())
    state, out = torch.zeros(heads, values.shape[-1], states), []
    for t in range(len(x)):
        added = (steps[t, :, None] * values[t])[..., None] * b[t]
        state = decay[t, :, None, None] * state + added
        out.append(state @ c[t] + weights[f"D{way}"][:, None] * values[t])
    gated = torch.stack(out).flatten(1) * F.silu(z)
    scale = gated.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
    return gated * scale * weights["norm.weight"]


def scanned(parts: dict[str, dict[str, torch.Tensor]], features: torch.Tensor) -> torch.Tensor:
    """Features (P, Dv) through the released code's `mlp`, `bidirectional_mamba` and `projector`."""
    x = F.gelu(features @ parts["mlp"]["0.weight"].T + parts["mlp"]["0.bias"])
    scan = parts["bidirectional_mamba"]
    for n in range(2):
        home = f"layers.{n}."
        own = {k.removeprefix(home): t for k, t in scan.items() if k.startswith(home)}
        mixer = {k.removeprefix("mixer."): t for k, t in own.items() if k.startswith("mixer.")}
        back = mamba2(mixer, x.flip(0), "_b").flip(0)
        x = x + (mamba2(mixer, x, "") + back) / 2 @ mixer["out_proj.weight"].T
        normed = F.layer_norm(x, x.shape[-1:], own["norm.weight"], own["norm.bias"])
        w1, w2 = (F.linear(normed, own[f"mlp.w{i}.weight"], own[f"mlp.w{i}.bias"]) for i in (1, 2))
        x = x + F.linear(F.silu(w1) * w2, own["mlp.w3.weight"], own["mlp.w3.bias"])
    x = F.layer_norm(x, x.shape[-1:], scan["norm_f.weight"], scan["norm_f.bias"])
    for n in (0, 2, 4):
        weight, bias = (parts["projector"][f"projector.{n}.{leaf}"] for leaf in ("weight", "bias"))
        x = F.linear(x if n == 0 else F.gelu(x), weight, bias)
    return x


def bidirectional_weights(width: int, heads: int, states: int) -> dict[str, torch.Tensor]:
    """`Bidirectional_Mamba` of the authors' fork, two layers, with random weights."""
    d_inner = 2 * width
    conv = d_inner + 2 * states
    shapes: dict[str, tuple[int, ...]] = {
        "mixer.in_proj.weight": (d_inner + conv + heads, width),
        "mixer.norm.weight": (d_inner,),
        "mixer.out_proj.weight": (width, d_inner),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for way in ("", "_b"):
        shapes |= {f"mixer.{name}{way}": (heads,) for name in ("dt_bias", "A_log", "D")}
        shapes |= {f"mixer.conv1d{way}.weight": (conv, 1, 4), f"mixer.conv1d{way}.bias": (conv,)}
    for n in (1, 2, 3):
        shapes |= {f"mlp.w{n}.weight": (width, width), f"mlp.w{n}.bias": (width,)}
    weights = {f"layers.{n}.{k}": torch.randn(s) * 0.3 for n in (0, 1) for k, s in shapes.items()}
    return weights | {
        "norm_f.weight": 1 + torch.randn(width) / 9,
        "norm_f.bias": torch.randn(width),
    }


@pytest.fixture
def ml_mamba(tmp_path):
    """A file of ML-Mamba by itself, as its hub repository has it, and its parts."""
    width, heads, states = 32, 8, 16
    config = Mamba2Config(
        vocab_size=320,
        hidden_size=width,
        num_hidden_layers=2,
        num_heads=heads,
        head_dim=2 * width // heads,
        state_size=states,
        n_groups=1,
        chunk_size=8,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=0,
    )
    language = random_weights(Mamba2ForCausalLM(config))
    linear = random_weights(torch.nn.Linear(128 + 144, width))
    parts = {
        "llm_backbone": original_names(language),
        "mlp": {f"0.{key}": tensor for key, tensor in linear.state_dict().items()},
        "bidirectional_mamba": bidirectional_weights(width, heads, states),
        "projector": {
            f"projector.{key}": t for key, t in projector(width, width).state_dict().items()
        },
    }
    file = tmp_path / "latest-checkpoint.pt"
    torch.save({"model": parts}, file)
    return SimpleNamespace(file=file, parts=parts, language=language)


@pytest.fixture
def ml_mamba_words(ml_mamba, timm_encoders, tokenizer_folder):
    return ["ml-mamba", ml_mamba.file, *timm_encoders.flags, "--tokenizer", tokenizer_folder]


def test_ml_mamba_computes_what_its_authors_compute(
    ml_mamba, ml_mamba_words, timm_encoders, tmp_path
):
    model, processor = converted(tmp_path / "ours", *ml_mamba_words)
    features = prismatic_features(timm_encoders, split_pixels(processor))
    image = scanned(ml_mamba.parts, features[0])
    assert (model.connector(features)[0] - image).abs().max() < TOLERANCE
    text = f"<|user|>\n{QUESTION}<|endoftext|>\n<|assistant|>\n"
    words = ml_mamba.language.get_input_embeddings()(
        torch.tensor(processor.tokenizer(text)["input_ids"])
    )
    expected = ml_mamba.language(inputs_embeds=torch.cat([image, words])[None]).logits[0]
    found = our_logits(model, processor)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1


def test_a_fresh_msc_starts_both_ways_alike_and_gives_every_parameter_a_gradient():
    config = tiny_config(connector="msc", connector_layer={"head_dim": 8})
    connector = VLMambaForConditionalGeneration(config).train().connector
    for block in connector.blocks:
        for name in ("dt_bias", "A_log", "D"):
            assert torch.equal(getattr(block.mixer, name), getattr(block.mixer, f"{name}_b"))
    connector(torch.randn(2, config.num_patches, config.vision_width)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in connector.parameters())


@pytest.mark.parametrize("key", ["layers.1.mixer.conv1d_b.bias", "layers.0.mlp.w2.weight"])
@pytest.mark.parametrize("how", ["missing", "unexpected"])
def test_its_broken_files_are_refused_in_one_line(
    how, key, ml_mamba, ml_mamba_words, tmp_path, capsys
):
    scan = ml_mamba.parts["bidirectional_mamba"]
    if how == "missing":
        del scan[key]
    else:
        key += "_c"
        scan[key] = torch.zeros(3)
    torch.save({"model": ml_mamba.parts}, ml_mamba.file)
    assert convert(*ml_mamba_words, "--out", tmp_path / "ours") == 2
    error = capsys.readouterr().err
    assert f"bidirectional_mamba.{key}" in error and error.count("\n") == 1


# --- Mamba-VL and Pythia-VL


def eva02() -> Eva:
    """`eva02_large_patch14_clip_336` with fewer and narrower layers."""
    return random_weights(
        Eva(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=128,
            depth=2,
            num_heads=2,
            mlp_ratio=4 * 2 / 3,
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(16, 16),
            global_pool="token",
            num_classes=0,
        )
    )


def layer_normed(model: MambaForCausalLM) -> MambaForCausalLM:
    """As the authors build it: `MixerModel(rms_norm=False, residual_in_fp32=False)`."""
    width = model.config.hidden_size
    for block in model.backbone.layers:
        block.norm, block.residual_in_fp32 = torch.nn.LayerNorm(width, eps=1e-5), False
    model.backbone.norm_f = torch.nn.LayerNorm(width, eps=1e-5)
    return random_weights(model)


def neox() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        bos_token_id=0,
        eos_token_id=0,
    )
    return random_weights(GPTNeoXForCausalLM(config), 0.2)


@pytest.fixture(params=["mamba-vl", "mamba-vl-rms", "pythia-vl"])
def paired(request, tmp_path):
    """A folder of a model of "Shaking up VLMs", and its parts."""
    encoder = eva02()
    connector = torch.nn.Sequential(
        torch.nn.Linear(128, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)
    )
    random_weights(connector)
    pythia = request.param == "pythia-vl"
    language = neox() if pythia else mamba()
    if request.param == "mamba-vl":
        language = layer_normed(language)
    weights = language.state_dict() if pythia else original_names(language)
    if pythia:
        weights["embed_out.weight"] = weights.pop("lm_head.weight")  # as transformers 4 has it
        weights["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.zeros(4)
    if not pythia:
        del weights["lm_head.weight"]  # shared tensors are saved once
    weights |= {f"vision_encoder.{key}": t for key, t in encoder.state_dict().items()}
    weights |= {f"vision_embed_tokens.{key}": t for key, t in connector.state_dict().items()}
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({key: t.clone() for key, t in weights.items()}, folder / "model.safetensors")
    settings = language.config.to_dict() if pythia else {"d_model": 32, "n_layer": 2}
    if settings.pop("rope_parameters", None):  # as transformers 4 has it
        settings |= {"rotary_pct": 0.5, "rotary_emb_base": 10000, "torch_dtype": "float32"}
    settings["vision_encoder_name"] = "timm/eva02_large_patch14_clip_336"
    (folder / "config.json").write_text(json.dumps(settings))
    return SimpleNamespace(
        name=request.param.removesuffix("-rms"),
        folder=folder,
        weights=weights,
        language=language,
        encoder=encoder,
        connector=connector,
    )


@pytest.fixture
def paired_words(paired, tokenizer_folder):
    return [paired.name, paired.folder, "--tokenizer", tokenizer_folder]


def test_mamba_vl_and_pythia_vl_compute_what_their_authors_compute(paired, paired_words, tmp_path):
    """Normed patches without the class token, rows parted (`prepare_image_tokens`)."""
    model, processor = converted(tmp_path / "ours", *paired_words)
    assert model.config.text_config.model_type == (
        "gpt_neox" if paired.name == "pythia-vl" else "vlmamba_text"
    )
    pixels = processor.pixel_values([PICTURE])
    patches = paired.connector(paired.encoder.forward_features(pixels)[:, 1:])[0]
    token, embed = processor.tokenizer, paired.language.get_input_embeddings()

    def words(text: str) -> torch.Tensor:
        return embed(torch.tensor(token(text)["input_ids"]))

    edge, between = words("###"), words("&&")
    rows = [edge, patches[:2], between, patches[2:], edge, words(f"{QUESTION}\n")]
    expected = paired.language(inputs_embeds=torch.cat(rows)[None]).logits[0]
    found = our_logits(model, processor)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1


def test_short_answers_are_asked_for_as_in_their_training(paired_words, tmp_path):
    _, processor = converted(tmp_path / "ours", *paired_words)
    short = "Answer the question using a single word or phrase."
    prompt = processor.conversation_prompt(f"{QUESTION}\n{short}")
    assert prompt == f"<image>{short}\nQuestion: {QUESTION}\nAnswer: "


def test_their_answers_are_the_same_in_batches_and_alone(paired_words, tmp_path):
    model, processor = converted(tmp_path / "ours", *paired_words)
    questions = [QUESTION, "What is there to be seen in it?", "no"]
    prompts = [Request(processor.conversation_prompt(q), "a", PICTURE) for q in questions]
    generator = GroupedGenerator(model, processor)
    together = generator.generate(prompts, 4)
    assert together == [generator.generate([prompt], 4)[0] for prompt in prompts]


@pytest.mark.parametrize("how", ["missing", "unexpected", "encoder", "truncated"])
def test_their_broken_files_are_refused_in_one_line(how, paired, paired_words, tmp_path, capsys):
    file, key = paired.folder / "model.safetensors", "vision_encoder.blocks.1.attn.norm.weight"
    weights, said = dict(paired.weights), key
    if how == "missing":
        del weights[key]
    elif how == "unexpected":
        said = "vision_encoder.blocks.0.attn.gate.weight"
        weights[said] = torch.zeros(2)
    save_file({k: t.clone() for k, t in weights.items()}, file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
        said = "not a readable safetensors file"
    elif how == "encoder":
        said = "vision_encoder_name is 'openai/clip-vit-large-patch14-336'"
        settings = json.loads((paired.folder / "config.json").read_text())
        settings["vision_encoder_name"] = "openai/clip-vit-large-patch14-336"
        (paired.folder / "config.json").write_text(json.dumps(settings))
    assert convert(*paired_words, "--out", tmp_path / "ours") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
