"""What is faster must be the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import maskdistill as md
from maskdistill.masking.mask import PatchMask
from maskdistill.models.speed import LastBlock, compile_blocks, unfuse_attention

SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 0, "dynamic_img_size": True}
SAME = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"init_values": 0.1, "drop_path_rate": 0.5}),
    ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2, "pre_norm": True}),
    ("vit_tiny_patch16_224", {"num_classes": 5}),
    ("vit_tiny_patch16_224", {"global_pool": ""}),
    ("eva02_tiny_patch14_224", {"global_pool": "token"}),
]
OTHER = [
    ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    ("vit_tiny_patch16_224", {"global_pool": "map"}),
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("beit_base_patch16_224", {"dynamic_img_size": None, "embed_dim": 192, "num_heads": 3}),
    ("swin_tiny_patch4_window7_224", {"patch_size": 4, "depth": None, "dynamic_img_size": None}),
]


def create(name: str, changes: dict[str, Any]) -> nn.Module:
    arguments = {k: v for k, v in {**SMALL, **changes}.items() if v is not None}
    torch.manual_seed(0)
    vit: nn.Module = timm.create_model(name, **arguments)
    return vit


@pytest.mark.parametrize(("name", "changes"), SAME, ids=str)
@pytest.mark.parametrize("apply", ["token", "drop", "pixel"])
def test_the_class_token_alone(name: str, changes: dict[str, Any], apply: Any) -> None:
    """Embedding and all gradients agree, for fewer operations, and other forwards are whole."""
    vit = md.MaskedViT(create(name, changes), apply)
    assert vit._last_block is not None
    images = torch.randn(3, 3, 32, 32)
    mask = md.RandomMasker(0.5)(3, vit.grid(32, 32))
    whole = vit.backbone.forward_features(images)
    gradients, embeddings = [], []
    for class_only in (False, True):
        vit.zero_grad()
        torch.manual_seed(1)  # of the drop path
        embedding = vit.embed(images, mask, class_only=class_only)
        (embedding * torch.linspace(-1, 1, embedding.shape[1])).sum().backward()
        embeddings.append(embedding.detach())
        parameters = {n: p for n, p in vit.named_parameters() if p.grad is not None}
        gradients.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
    torch.testing.assert_close(*embeddings)
    assert gradients[0].keys() == gradients[1].keys()
    for key in gradients[0]:
        difference = (gradients[1][key] - gradients[0][key]).norm()
        assert float(difference) <= 1e-5 * float(gradients[0][key].norm()) + 1e-5, key
    if not changes.get("drop_path_rate"):
        assert torch.equal(vit.backbone.forward_features(images), whole)


def test_the_class_token_alone_costs_less() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    vit = md.MaskedViT(create("vit_tiny_patch16_224", {}))
    costs = []
    for class_only in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit.embed(torch.randn(2, 3, 32, 32), class_only=class_only)
        costs.append(counter.get_total_flops())
    # 9 of the 24 parts of two blocks, for 16 of 17 tokens
    assert costs[1] / costs[0] == pytest.approx(1 - 9 / 24 * 16 / 17, abs=0.03)


@pytest.mark.parametrize(("name", "changes"), OTHER, ids=str)
def test_other_models_keep_their_last_block(name: str, changes: dict[str, Any]) -> None:
    vit = create(name, changes)
    assert not LastBlock.suits(vit)
    wrapped = md.MaskedViT(vit)
    images = torch.randn(2, 3, 32, 32)
    vit.eval()
    assert torch.equal(wrapped.embed(images, class_only=True), wrapped.embed(images))


def test_an_error_leaves_nothing_behind() -> None:
    vit = md.MaskedViT(create("vit_tiny_patch16_224", {})).eval()
    images = torch.randn(2, 3, 32, 32)
    before = vit.forward_features(images)
    with pytest.raises(ValueError, match="mask must be"):
        vit.embed(images, torch.zeros(2, 3, dtype=torch.bool), class_only=True)
    assert torch.equal(vit.forward_features(images), before)
    twin = copy.deepcopy(vit)
    vit.embed(images, class_only=True)
    assert torch.equal(twin.forward_features(images), before)
    vit.unwrap()
    assert torch.equal(vit.backbone.forward_features(images), before)


def test_attention_is_whole_where_it_is_recorded() -> None:
    vit = md.MaskedViT(create("vit_tiny_patch16_224", {})).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), vit.record_attention() as record:
        vit.embed(images, class_only=True)
    torch.testing.assert_close(record.attention, vit.attention(images))


def test_unfused_attention_is_the_same() -> None:
    vit = create("vit_tiny_patch16_224", {}).eval()
    images = torch.randn(2, 3, 32, 32)
    before: Tensor = vit(images)
    unfuse_attention(vit)
    assert not any(getattr(module, "fused_attn", False) for module in vit.modules())
    torch.testing.assert_close(vit(images), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
def test_compiled_blocks_are_the_same() -> None:
    vit = create("vit_tiny_patch16_224", {"drop_path_rate": 0.0})
    net = md.MaskedViT(vit, "drop")
    images, mask = torch.randn(2, 3, 32, 32), md.RandomMasker(0.5)(2, (4, 4))
    before, keys = net.embed(images, PatchMask(mask, 8), class_only=True), list(net.state_dict())
    compile_blocks(vit, backend="aot_eager")
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net.embed(images, PatchMask(mask, 8), class_only=True), before)
    with pytest.raises(ValueError, match="no list of blocks"):
        compile_blocks(nn.Linear(1, 1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile's own
def test_blocks_share_their_code() -> None:
    """Whatever their drop path, else torch gives up after eight and runs the others uncompiled."""
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    net = md.MaskedViT(create("vit_tiny_patch16_224", {"depth": 12, "drop_path_rate": 0.1}))
    keys = list(net.state_dict())
    compile_blocks(net.backbone, backend=count)
    assert list(net.state_dict()) == keys
    for size in (32, 16, 32):
        net.embed(torch.randn(2, 3, size, size), class_only=True).sum().backward()
    assert 1 <= len(graphs) <= 3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_drop_path_of_compiled_blocks() -> None:
    """Samples lose a residual as often as they did, and what stays is scaled."""
    vit: Any = create("vit_tiny_patch16_224", {"depth": 3, "drop_path_rate": 0.4})
    compile_blocks(vit, backend="eager")
    for block, probability in zip(vit.blocks, (0.0, 0.2, 0.4), strict=True):
        out = block.drop_path1.train()(torch.ones(20_000, 2))
        assert torch.equal(out[:, 0], out[:, 1])
        assert set(out.unique().tolist()) <= {0.0, float(1 / torch.tensor(1 - probability))}
        assert float((out == 0).float().mean()) == pytest.approx(probability, abs=0.015)
        assert torch.equal(block.drop_path1.eval()(torch.ones(9, 2)), torch.ones(9, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_hooks_run_in_compiled_models() -> None:
    """Attention is recorded in the last block, which looks to torch like all the others."""
    net = md.MaskedViT(create("vit_tiny_patch16_224", {"depth": 3, "drop_path_rate": 0.1})).eval()
    unfuse_attention(net)
    images = torch.randn(2, 3, 32, 32)
    before = net.attention(images)
    compile_blocks(net.backbone, backend="aot_eager")
    with torch.no_grad():
        net.embed(images)
        torch.testing.assert_close(net.attention(images), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_run_again_as_they_ran(reentrant: bool) -> None:
    """The embedding's gradients survive gradient checkpointing of either kind."""
    net = md.MaskedViT(create("vit_tiny_patch16_224", {}))
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for checkpointing in (False, True):
        net.zero_grad()
        net.backbone.set_grad_checkpointing(checkpointing)
        was = timm.layers.use_reentrant_ckpt()
        timm.layers.set_reentrant_ckpt(reentrant)
        try:
            embedding = net.embed(images, class_only=True)
            (embedding * torch.linspace(-1, 1, embedding.shape[1])).sum().backward()
        finally:
            timm.layers.set_reentrant_ckpt(was)
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
