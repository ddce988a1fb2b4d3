"""A stand-in for facebookresearch/dino: a ViT and a multi-crop wrapper of the same structure."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, WIDTH, BATCH, GLOBAL, LOCAL = 8, 16, 3, 32, 16


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size = PATCH
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).mT


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q @ k.mT / 8**0.5).softmax(dim=-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = WIDTH
        self.patch_embed = Patches()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (GLOBAL // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.cat(
            [self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], 1
        )
        tokens = tokens + self.positions(images.shape[-1] // PATCH)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def positions(self, side: int) -> Tensor:
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        plane = rest.mT.unflatten(2, (GLOBAL // PATCH, -1))
        plane = F.interpolate(plane, size=(side, side), mode="bilinear")
        return torch.cat([first, plane.flatten(2).mT], dim=1)


class Crops(nn.Module):
    """One forward per run of crops of one size, and one head for all."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(WIDTH, 8)

    def forward(self, crops: list[Tensor]) -> Tensor:
        groups = itertools.groupby(crops, key=lambda crop: crop.shape[-1])
        return self.head(torch.cat([self.backbone(torch.cat(list(group))) for _, group in groups]))
