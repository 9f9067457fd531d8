"""Experts: their equations token by token, batches, what is added to the loss, who sees what."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_hybrid import built
from tiny import tiny_config

from vlmamba import experts as command
from vlmamba.configs.language import MambaConfig
from vlmamba.configs.presets import LANGUAGE_MODELS
from vlmamba.data.collate import Batch, collate
from vlmamba.data.examples import Example
from vlmamba.models.language.mamba import MambaLM
from vlmamba.models.mixers.experts import Experts
from vlmamba.training.init_model import adopt
from vlmamba.training.recipe import Hyperparameters, build_objective
from vlmamba_core.errors import UserError

TINY = {"mixer": "mamba,experts", "n_layer": 4, "d_intermediate": 24, "n_experts": 4}


@pytest.fixture
def layer() -> Experts:
    torch.manual_seed(0)
    return Experts(MambaConfig(d_model=32, **TINY, balance_loss=0.5, router_z_loss=0.25)).eval()


def by_hand(layer: Experts, u: torch.Tensor) -> tuple[torch.Tensor, list[float], list[int], float]:
    """One token: output, scores, who was chosen, logsumexp of the logits."""
    logits = [float(x) for x in layer.router.weight.double() @ u.double()]
    top = math.log(sum(map(math.exp, logits)))
    scores = [math.exp(x - top) for x in logits]
    best = sorted(range(len(scores)), key=lambda e: -scores[e])[:2]
    total = sum(scores[e] for e in best)
    y = torch.zeros_like(u)
    for e in best:
        gate, up = layer.experts[e].in_proj.weight.chunk(2)
        inner = F.silu(gate @ u) * (up @ u)
        y = y + scores[e] / total * (layer.experts[e].out_proj.weight @ inner)
    return y, scores, best, top


@torch.no_grad()
def test_a_token_goes_through_its_two_best_experts(layer):
    u = torch.randn(2, 7, 32)
    for found, given in zip(layer(u).flatten(0, 1), u.flatten(0, 1), strict=True):
        torch.testing.assert_close(found, by_hand(layer, given)[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(layer(u[:, 3]), layer(u)[:, 3], atol=1e-6, rtol=1e-5)  # a step


def test_the_losses_are_those_of_the_real_tokens(layer):
    u, lengths = torch.randn(2, 7, 32), [7, 3]
    layer.train()(u, torch.tensor(lengths))
    with torch.no_grad():
        tokens = [by_hand(layer, u[row, t]) for row in (0, 1) for t in range(lengths[row])]
    n = len(tokens)
    f = [sum(best.count(e) for _, _, best, _ in tokens) / (2 * n) for e in range(4)]
    p = [sum(scores[e] for _, scores, _, _ in tokens) / n for e in range(4)]
    balance = 4 * sum(a * b for a, b in zip(f, p, strict=True))
    z = sum(top**2 for *_, top in tokens) / n
    assert float(layer.auxiliary.detach()) == pytest.approx(0.5 * balance + 0.25 * z, rel=1e-5)


def test_one_expert_a_token_teaches_the_router_too():
    """Its share among the chosen would always be 1: Switch scales by the score."""
    torch.manual_seed(0)
    layer = Experts(MambaConfig(d_model=32, **TINY, experts_per_token=1))
    u = torch.randn(3, 32)
    layer.eval()(u).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0
    with torch.no_grad():
        score, chosen = layer.router(u).softmax(-1).max(-1)
        made = torch.stack([layer.experts[e](x[None])[0] for e, x in zip(chosen, u, strict=True)])
        torch.testing.assert_close(layer(u), made * score[:, None], atol=1e-6, rtol=1e-5)


def test_a_router_that_does_not_learn_adds_no_loss():
    model = built(**TINY, balance_loss=1.0).train()
    ids = torch.randint(2, 300, (2, 9))
    learning = float(model(ids, labels=ids).loss.detach())
    model.language_model.requires_grad_(False)
    frozen = float(model(ids, labels=ids).loss.detach())
    assert frozen < learning - 1


@torch.no_grad()
def test_an_answer_does_not_depend_on_its_batch():
    """No expert has a capacity, so nothing is dropped for a neighbor's sake."""
    model = built(**TINY).language_model
    ids = torch.randint(320, (16, 20))
    lengths = torch.randint(1, 21, (16,))
    together, state = model(model.embed(ids), None, lengths)
    stepped = model.step(model.embed(ids[:, 0]), state)
    for row, length in enumerate(lengths.tolist()):
        alone, cache = model(model.embed(ids[row : row + 1, :length]))
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=0)
        after = model.step(model.embed(ids[row : row + 1, 0]), cache)
        torch.testing.assert_close(stepped[row], after[0], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_its_batch():
    """Few tokens and many reach an expert by the same kernels, as sequences and as steps."""
    layer = built(**TINY).language_model.layers[1].mixer
    u = torch.randn(40, 20, layer.router.weight.shape[1])
    whole = layer(u)
    for row in (0, 7, 39):
        assert torch.equal(layer(u[row : row + 1])[0], whole[row])
    steps = layer(u[:, 0])
    for row in (0, 7, 39):
        assert torch.equal(layer(u[row : row + 1, 0])[0], steps[row])


def test_training_adds_them_to_the_loss_and_evaluation_does_not():
    model = built(**TINY)
    ids = torch.randint(2, 300, (2, 9))
    plain = model(ids, labels=ids).loss
    loss = model.train()(ids, labels=ids).loss
    added = 0.0
    for block in (model.language_model.layers[1], model.language_model.layers[3]):
        assert block.mixer.auxiliary is None  # asked for once
    for weights in ((1.0, 0.0), (0.0, 0.0)):
        for block in (model.language_model.layers[1], model.language_model.layers[3]):
            block.mixer.weights = weights
        added = float((model(ids, labels=ids).loss - plain).detach())
        assert added >= 2 * 0.9 * weights[0] - 1e-5  # two layers, each at least near 1
    assert added == pytest.approx(0, abs=1e-5) and float(loss.detach()) > float(plain.detach())
    model(ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.language_model.parameters()]
    assert all(g is not None for g in grads)  # an expert that nobody chose has one of zeros


def test_padding_counts_for_no_term_in_training():
    """Mixtral's load_balancing_loss_func leaves it out by the attention mask, too."""
    model = built(**TINY, balance_loss=1.0, router_z_loss=1.0).train()
    rows = [Example(ids, ids.clone()) for ids in (torch.randint(2, 300, (n,)) for n in (24, 8))]

    def terms(padding: int, masked: bool) -> float:
        inputs = collate(rows, padding, masked=masked).inputs
        model(inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
        return float(model.language_model.auxiliary_loss().detach())

    assert terms(0, masked=True) == pytest.approx(terms(5, masked=True), rel=1e-6)
    assert terms(0, masked=False) != pytest.approx(terms(5, masked=False), rel=1e-4)
    assert model.language_model.weighs_padding
    assert not built(n_layer=2).language_model.weighs_padding


def test_the_square_average_keeps_them():
    model = built(**TINY, balance_loss=1000.0)
    ids = torch.randint(2, 300, (2, 9))
    batch = Batch({"input_ids": ids, "labels": ids.clone()}, 16, 18, 0, [])
    sizes = {"lr": 1e-3, "batch_size": 2, "micro_batch": 2, "dtype": "fp32"}
    objective = build_objective(Hyperparameters(**sizes, objective="square_average"))
    found = float(objective(model.train(), batch, torch.device("cpu")).detach())
    assert found / objective.count(batch) > 1000


def test_experts_put_into_a_trained_model_change_nothing_yet():
    donor, model = built(n_layer=2), built(**TINY)
    adopt(model, donor, "language_model", "donor")
    ids = torch.randint(320, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, donor(ids).logits, atol=0, rtol=0)


def test_flops_count_the_experts_that_a_token_goes_through():
    few, many = (built(**TINY | {"n_experts": n}).language_model for n in (2, 4))
    routers = 2 * 2 * 2 * 32  # two more logits in each of two layers
    assert many.flops(10) - few.flops(10) == 10 * routers


def test_published_size():
    fields = {k: v for k, v in LANGUAGE_MODELS["mamba-experts-2.8b"].items() if "_id" not in k}
    with torch.device("meta"):
        model = MambaLM(MambaConfig(**fields))
    total = sum(p.numel() for p in model.parameters())
    assert 2.7e9 < total < 2.9e9  # BlackMamba's 2.8B


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="experts_per_token is 3; there are 2 experts"):
        MambaConfig(mixer="mamba,experts", n_experts=2, experts_per_token=3)
    with pytest.raises(UserError, match="balance_loss is -1"):
        MambaConfig(balance_loss=-1)


def test_the_table_tells_pictures_from_words(tmp_path, processor, capsys):
    model = built(**TINY)
    with torch.no_grad():  # the router of the first layer sees whether a token is an image's
        model.language_model.layers[1].mixer.router.weight.zero_()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a box"}]
    rows = [{"id": str(n), "image": "a.png", "conversations": talk} for n in range(3)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    words = ["--data", str(tmp_path / "data.json"), "--images", str(tmp_path)]
    assert command.main(["--model", str(tmp_path / "model"), *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "data.json").write_text(json.dumps([rows[0] | {"image": "b.png"}, *rows]))
    assert command.main(["--model", str(tmp_path / "model"), *words]) == 0
    again = capsys.readouterr()
    assert again.out.splitlines() == printed and "left out: " in again.err
    assert [line.split()[:2] for line in printed[1:]] == [
        [layer, kind] for layer in "13" for kind in ("image", "text")
    ]
    for line in printed[1:]:
        shares = [float(cell.rstrip("%")) for cell in line.split()[2:6]]
        assert sum(shares) == pytest.approx(100, abs=0.3)
    assert printed[1].split()[-1] == "0.50"  # equal scores: always the same two of four
    assert command.main(["--model", "nano", *words]) == 2
    assert "has no experts" in capsys.readouterr().err


@pytest.fixture
def config():
    return tiny_config(**TINY)


def test_a_batch_can_be_pinned(monkeypatch):
    """As a DataLoader with pin_memory asks of what it does not know."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    batch = Batch({"input_ids": torch.zeros(1, 2)}, 0, 2, 0, [])
    assert batch.pin_memory() is batch
    assert batch.inputs["input_ids"].tolist() == [[1.0, 1.0]]
