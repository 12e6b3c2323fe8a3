"""Vision transformers as backbones, with weights that the tests write: shapes, geometry, loading."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import kizu
from kizu.features import backbone
from test_detectors import part

TINY = "test_vit"  # 6 blocks of 64 channels, patches of 16, a class token, made for 160 × 160


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(TINY)
    with torch.no_grad():
        network.pos_embed.normal_(std=0.5)
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_clip_is_clip():
    network = backbone.Backbone("clip", ("2", "11"), (224, 224))
    assert network.layers == ("blocks.2", "blocks.11")
    np.testing.assert_allclose(network.mean.flatten() / 255, [0.48145466, 0.4578275, 0.40821073], rtol=1e-6)
    np.testing.assert_allclose(network.std.flatten() / 255, [0.26862954, 0.26130258, 0.27577711], rtol=1e-6)
    with torch.inference_mode():
        maps = network(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert [tuple(layer.shape) for layer in maps] == [(1, 768, 7, 7), (1, 768, 7, 7)]
    names = set(network.state_dict())
    assert "network.model.norm_pre.weight" in names  # CLIP normalises before its first block
    assert type(network.network.model.blocks[0].mlp.act).__name__ == "QuickGELU"


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("vit_base_patch16_clip_quickgelu_224.openai", (64, 96), (4, 6)),
        ("vit_small_patch14_reg4_dinov2.lvd142m", (70, 56), (5, 4)),
        ("vit_small_patch16_dinov3.lvd1689m", (64, 96), (4, 6)),
        (TINY, (64, 96), (4, 6)),
    ],
)
def test_class_and_register_tokens_are_dropped_and_the_grid_fits_the_size(name, size, grid):
    network = backbone.Backbone(name, ("1", "0"), size).eval()
    with torch.inference_mode():
        maps = network(torch.zeros(2, 3, *size, dtype=torch.uint8))
    assert [tuple(layer.shape[2:]) for layer in maps] == [grid, grid] and network.layers == ("blocks.1", "blocks.0")
    assert not any("blocks.2." in key for key in network.state_dict())  # nothing behind the last tap is built


def test_a_layer_is_the_output_of_that_residual_block(weights):
    images = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    layers = backbone.create(TINY, ("3", "1"), str(weights), (160, 160))(images)
    network = timm.create_model(TINY).eval()
    network.load_state_dict(kizu.features.backbone.load_file(weights))
    tokens: dict[int, torch.Tensor] = {}
    for number in (1, 3):
        network.blocks[number].register_forward_hook(lambda _, __, out, n=number: tokens.__setitem__(n, out))
    with torch.inference_mode():
        network((images.float() / 255 - 0.5) / 0.5)
    for ours, number in zip(layers, (3, 1), strict=True):
        patches = tokens[number][:, 1:].reshape(2, 10, 10, 64).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, patches, atol=1e-4, rtol=1e-4)


def test_the_position_embedding_is_resized_to_other_inputs(weights):
    state = kizu.features.backbone.load_file(weights)["pos_embed"]
    network = backbone.create(TINY, ("0",), str(weights), (64, 320))
    ours = network.state_dict()["network.model.pos_embed"]
    grid = state[:, 1:].reshape(1, 10, 10, 64).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(4, 20), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 80, 64)
    torch.testing.assert_close(ours, torch.cat([state[:, :1], expected], dim=1))


def test_patch_i_j_answers_to_the_image_region_i_j(weights):
    network = backbone.create(TINY, ("0",), str(weights), (96, 160))
    grey = torch.full((1, 3, 96, 160), 128, dtype=torch.uint8)
    before = network(grey)[0]
    for i, j in ((0, 0), (2, 7), (5, 9), (3, 1)):
        changed = grey.clone()
        changed[..., 16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = 255
        difference = (network(changed)[0] - before).norm(dim=1)[0]
        assert divmod(int(difference.argmax()), 10) == (i, j)


@pytest.mark.parametrize("kind", [kizu.PatchCore, kizu.SimpleNet])
def test_detectors_work_on_them_and_are_saved_with_their_weights(kind, weights, tmp_path):
    own = {"meta_epochs": 3} if kind is kizu.SimpleNet else {"coreset": 0.2}
    settings = {"backbone": TINY, "layers": "1,2", "weights": str(weights), "size": (96, 128), "smoothing": 0, **own}
    detector = kind(**settings).fit([part(seed) for seed in range(6)])
    model = detector.save(tmp_path / "model")
    weights.unlink()
    loaded = kizu.load(model)
    score, anomaly_map = loaded.predict(part(99, spot=True))
    assert score == detector.predict(part(99, spot=True)).score and anomaly_map.shape == (96, 96)
    assert detector.describe()["backbone"]["weights"] == loaded.describe()["backbone"]["weights"]


def test_weights_of_another_transformer_are_refused(tmp_path):
    state = timm.create_model(TINY).state_dict()
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"][:, :32].contiguous()
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(kizu.ModelError, match="shape"):
        backbone.create(TINY, ("1",), str(tmp_path / "other.safetensors"), (160, 160))
