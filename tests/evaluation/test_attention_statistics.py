"""Entropy, diversity, spread and distance, against SciPy, loops and cases with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor, nn

import maskdistill as md
from maskdistill.evaluation.attention import (
    attention_distances,
    attention_entropy,
    attention_spread,
    head_diversity,
    mean_attention_distance,
    patch_weights,
)


def test_entropy_is_scipys() -> None:
    attention = torch.rand(4, 3, 10)
    expected = torch.from_numpy(entropy(attention.numpy(), axis=-1)) / math.log(10)
    torch.testing.assert_close(attention_entropy(attention), expected)
    even, single = torch.full((5,), 0.03), torch.eye(5)[2]
    assert float(attention_entropy(even)) == pytest.approx(1)
    assert float(attention_entropy(single)) == 0
    assert float(attention_entropy(torch.zeros(5))) == 0, "no mass, no spread, no NaN"


def test_diversity_is_the_mean_divergence_of_pairs() -> None:
    attention = torch.rand(2, 4, 9)
    maps = attention.double().numpy()
    for image in range(2):
        # SciPy gives the distance, which is the root of the divergence.
        pairs = [
            jensenshannon(maps[image, i], maps[image, j], base=2) ** 2
            for i in range(4)
            for j in range(i)
        ]
        ours = float(head_diversity(attention)[image])
        assert ours == pytest.approx(sum(pairs) / len(pairs), rel=1e-4)


def test_diversity_at_its_ends() -> None:
    alike = torch.rand(3, 1, 8).expand(3, 5, 8)
    assert float(head_diversity(alike).max()) == pytest.approx(0, abs=1e-6)
    assert head_diversity(torch.eye(4)[None]).tolist() == [1.0]
    assert head_diversity(torch.rand(2, 1, 8)).tolist() == [0, 0], "one head has no pair"


def test_spread_of_known_maps() -> None:
    two = torch.zeros(1, 1, 12)
    two[..., 0] = two[..., 11] = 1.0  # opposite corners of 3x4 patches of 8x10 pixels
    half = ((2 * 8) ** 2 + (3 * 10) ** 2) ** 0.5 / 2
    assert float(attention_spread(two, (3, 4), (8, 10))) == pytest.approx(half)
    assert attention_spread(torch.eye(12), (3, 4), 16).tolist() == [0.0] * 12


def test_distance_is_the_loop() -> None:
    rows, columns, (height, width) = 2, 3, (4, 6)
    weights = torch.rand(2, 6, 6)
    expected = torch.zeros(2)
    for head in range(2):
        for query in range(6):
            mean = 0.0
            for key in range(6):
                dy = (query // columns - key // columns) * height
                dx = (query % columns - key % columns) * width
                mean += float(weights[head, query, key]) * (dy * dy + dx * dx) ** 0.5
            expected[head] += mean / float(weights[head, query].sum()) / 6
    ours = mean_attention_distance(weights, (rows, columns), (height, width))
    torch.testing.assert_close(ours, expected)
    assert float(mean_attention_distance(torch.eye(6), (2, 3), 16)) == 0


def tiny(**settings: int) -> md.MaskedViT:
    return md.MaskedViT(md.create_backbone("vit_tiny_patch16_224", 32, 8, depth=2, **settings))


def test_distances_of_all_blocks() -> None:
    """The last block's, from what its attention records; on any batch size; the model unchanged."""
    vit, images = tiny(), torch.randn(5, 3, 32, 32)
    blocks = vit.backbone.blocks
    blocks[0].attn.qkv.weight.data.zero_()  # attends evenly
    blocks[0].attn.qkv.bias.data.zero_()
    fused = [block.attn.fused_attn for block in blocks]
    distances = attention_distances(vit, images)
    assert distances.shape == (2, 3)
    even = mean_attention_distance(torch.ones(16, 16), (4, 4), 8)
    torch.testing.assert_close(distances[0], even.expand(3))
    seen: list[Tensor] = []
    hook = blocks[1].attn.attn_drop.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    blocks[1].attn.fused_attn = False
    with torch.no_grad():
        vit.eval()(images)
    hook.remove()
    blocks[1].attn.fused_attn = fused[1]
    expected = mean_attention_distance(seen[0][:, :, 1:, 1:], (4, 4), 8).mean(dim=0)
    torch.testing.assert_close(distances[1], expected)
    torch.testing.assert_close(attention_distances(vit, images, batch_size=2), distances)
    assert [block.attn.fused_attn for block in blocks] == fused
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in blocks)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        attention_entropy(torch.ones(3, 1))
    with pytest.raises(ValueError, match="heads, N"):
        head_diversity(torch.rand(3, 4))
    with pytest.raises(ValueError, match="grid of 2x3"):
        attention_spread(torch.rand(3, 4), (2, 3), 16)
    with pytest.raises(ValueError, match="all patches to all"):
        mean_attention_distance(torch.rand(3, 6), (2, 3), 16)
    with pytest.raises(ValueError, match="not of all patches"):
        patch_weights(torch.rand(1, 3, 9, 9), (2, 3), prefix=1)
    with pytest.raises(ValueError, match="got none"):
        attention_distances(tiny(), torch.zeros(0, 3, 32, 32))
    convolutions = md.MaskedViT(nn.Sequential(nn.Conv2d(3, 4, 8, 8)), "pixel", patch_size=8)
    with pytest.raises(ValueError, match="could not be read"):
        attention_distances(convolutions, torch.zeros(1, 3, 32, 32))
