"""The demo's encoder: features of several stages for one patch, beside timm's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlmamba.checkpoints import load
from vlmamba.config import VLMambaConfig
from vlmamba.configs.encoders import EfficientNetLite0Config
from vlmamba.configs.presets import VISION_ENCODERS
from vlmamba.models.vision.efficientnet import EfficientNetLite0Encoder
from vlmamba.training.init_model import initial_model
from vlmamba.training.stages import STAGES
from vlmamba_core.errors import UserError

LEVELS = VISION_ENCODERS["efficientnet-lite0-levels"]
CELLS = VISION_ENCODERS["efficientnet-lite0-cells"]


def encoder(**changed) -> EfficientNetLite0Encoder:
    fields = {k: v for k, v in (LEVELS | changed).items() if k != "model_type"}
    made = EfficientNetLite0Encoder(EfficientNetLite0Config(**fields), -1, None)
    made.load_pretrained()
    return made


def pixels(size: int = 224) -> torch.Tensor:
    """Pictures with areas and edges, as the transform gives them."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (14, 14, 3), np.uint8) for _ in range(6)]
    pictures = [Image.fromarray(one).resize((224, 224), Image.Resampling.BICUBIC) for one in small]
    transform = EfficientNetLite0Encoder.transform(EfficientNetLite0Config())
    made = transform(images=pictures, return_tensors="pt")["pixel_values"]
    return torch.nn.functional.interpolate(made, size=(size, size), mode="bilinear")


@torch.inference_mode()
def test_levels_are_the_stages_own_features_at_a_patchs_places():
    plain, made, x = encoder(hidden_size=1280, levels=[]), encoder(), pixels()
    got = made(x)
    assert got.shape == (6, 49, LEVELS["hidden_size"])
    assert torch.equal(got[..., :1280], plain(x))
    kept = made.model.forward_intermediates(x, indices=[2, 3], intermediates_only=True)
    raw = got * made.std + made.mean
    start = 1280
    for stage, side in zip(kept, (4, 2), strict=True):  # strides 8 and 16
        width = stage.shape[1] * side * side
        for row, column in ((0, 0), (3, 5), (6, 6)):
            patch = raw[:, 7 * row + column, start : start + width].view(6, -1, side, side)
            rows, columns = slice(side * row, side * row + side), slice(side * column, None)
            torch.testing.assert_close(patch, stage[:, :, rows, columns][..., :side])
        start += width
    assert start == LEVELS["hidden_size"]


@torch.inference_mode()
def test_a_larger_patch_has_the_mean_of_the_last_features_and_all_places():
    made, plain = encoder(**CELLS), encoder(hidden_size=1280, levels=[], image_size=256)
    x = pixels(256)
    got, small = made(x), plain(x).view(6, 4, 2, 4, 2, 1280)
    assert got.shape == (6, 16, CELLS["hidden_size"])
    want = small.mean(dim=(2, 4)).view(6, 16, 1280)
    torch.testing.assert_close(got[..., :1280], want, rtol=1e-4, atol=1e-4)
    [stage] = made.model.forward_intermediates(x, indices=[3], intermediates_only=True)
    raw = (got * made.std + made.mean)[:, 4 * 2 + 3, 1280:]
    torch.testing.assert_close(raw.view(6, 112, 4, 4), stage[:, :, 8:12, 12:16])


def test_a_trained_language_model_goes_behind_another_encoder_where_the_connector_begins_anew():
    config = VLMambaConfig.preset("nano+efficientnet-lite0-cells+vss_l2+bsm")
    made, _ = initial_model(config, STAGES["pretrain"], "nano", [], 0)
    donor, _ = load("nano", dtype=torch.float32)
    assert torch.equal(made.vision_encoder(pixels(256)), encoder(**CELLS)(pixels(256)))
    for key, weight in donor.language_model.state_dict().items():
        assert torch.equal(made.language_model.state_dict()[key], weight)
    with pytest.raises(UserError, match="vision_encoder of nano does not fit"):
        initial_model(config, STAGES["finetune"], "nano", [], 0)


@torch.inference_mode()
def test_every_level_is_about_standardized():
    got = encoder()(pixels())
    for part in (got[..., 1280:1920], got[..., 1920:]):
        assert abs(float(part.mean())) < 0.3
        assert 0.5 < float(part.std(dim=(0, 1)).median()) < 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 1280}, "is 1280, its features and those of levels [2, 4] are 2368"),
        ({"levels": [7]}, "level 7 is none of EfficientNet-Lite0's, 0 to 6"),
    ],
)
def test_what_does_not_fit_is_told(changed, message):
    with pytest.raises(UserError) as caught:
        encoder(**changed)
    assert message in str(caught.value)


def test_the_configuration_keeps_its_levels(tmp_path):
    config = VLMambaConfig.preset("nano+efficientnet-lite0-levels+mlp")
    config.save_pretrained(tmp_path)
    assert VLMambaConfig.from_pretrained(tmp_path).vision_config.levels == [2, 4]
    assert VLMambaConfig.preset("nano+mlp").vision_config.levels == []
