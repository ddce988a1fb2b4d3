"""A small model of each family of timm, for tests on real numbers."""

from __future__ import annotations

import functools
import math
from typing import Any

import timm
import torch
from torch import nn

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2}
_SWIN = {"img_size": 64, "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}

# timm's name: (arguments that make it small, image size)
SMALL: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": (_VIT, 32),
    "vit_base_patch32_clip_224": (_VIT, 32),  # norm_pre
    "vit_little_patch16_reg4_gap_256": (_VIT, 32),  # registers, no class token, mean
    "vit_base_patch16_siglip_224": (_VIT, 32),  # attention pooling
    "vit_small_patch14_reg4_dinov2": (_VIT, 32),  # no_embed_class, LayerScale
    "vit_dlittle_patch16_reg1_gap_256": (_VIT, 32),  # differential attention
    "flexivit_small": (_VIT, 32),
    "vit_so400m_patch14_siglip_384": ({**_VIT, "img_size": 36}, 36),  # patches that leave a rest
    "aimv2_large_patch14_224": (_VIT, 32),  # RMS norm, SwiGLU, no prefix
    "beit3_base_patch16_224": (_VIT, 32),
    "deit_tiny_distilled_patch16_224": (_VIT, 32),
    "deit3_small_patch16_224": (_VIT, 32),
    "eva02_tiny_patch14_224": (_VIT, 32),
    "vit_small_patch16_dinov3": ({**_VIT, "embed_dim": 32}, 32),
    "vit_small_patch16_rope_mixed_224": ({**_VIT, "embed_dim": 32}, 32),
    "vit_pe_core_tiny_patch16_384": ({**_VIT, "embed_dim": 32}, 32),
    "vit_tiny_r_s16_p8_224": ({"img_size": 64, "depth": 1}, 64),  # hybrid: a stem of convolutions
    "vitamin_small_224": ({"img_size": 64, "depth": 1}, 64),
    "naflexvit_base_patch16_gap": ({k: v for k, v in _VIT.items() if k != "img_size"}, 32),
    "naflexvit_base_patch16_parfac_gap": ({k: v for k, v in _VIT.items() if k != "img_size"}, 32),
    "beit_base_patch16_224": (_VIT, 32),
    "vit_relpos_small_patch16_224": (_VIT, 32),
    "vit_srelpos_small_patch16_224": (_VIT, 32),
    "vit_relpos_base_patch16_cls_224": (_VIT, 32),
    "cait_xxs24_224": (_VIT, 32),
    "hiera_tiny_224": ({"embed_dim": 16, "stages": (1, 1, 1, 2), "img_size": (64, 64)}, 64),
    "hieradet_small": ({"embed_dim": 16, "num_heads": 1}, 64),
    "convit_tiny": ({**_VIT, "local_up_to_layer": 1}, 32),
    "xcit_nano_12_p8_224": ({"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}, 32),
    "volo_d1_224": ({"img_size": 64}, 64),
    "samvit_base_patch16": ({**_VIT, "window_size": 2, "global_attn_indexes": (1,)}, 32),
    "swin_tiny_patch4_window7_224": ({**_SWIN, "window_size": 2}, 64),
    "swinv2_tiny_window8_256": ({**_SWIN, "window_size": 2}, 64),
    "swinv2_cr_tiny_224": ({**_SWIN, "window_size": 2}, 64),
    "pit_ti_224": ({}, 224),
    "pit_ti_distilled_224": ({}, 224),  # two prefix tokens, of which it does not tell
    "nest_tiny": ({"img_size": 64}, 64),
    "mvitv2_tiny": ({"img_size": 64}, 64),
    "mvitv2_base_cls": ({"img_size": 64}, 64),
    "pvt_v2_b0": ({}, 64),
    "davit_tiny": ({}, 64),
    "twins_pcpvt_small": ({"img_size": 64}, 64),
    "twins_svt_small": ({"img_size": 64}, 64),
    "levit_128s": ({}, 224),
    "coat_lite_tiny": ({"img_size": 64}, 64),
    "gcvit_xxtiny": ({"img_size": 64}, 64),
    "coatnet_nano_rw_224": ({}, 224),
    "tiny_vit_5m_224": ({}, 224),
    "visformer_tiny": ({}, 224),
    "efficientformer_l1": ({}, 224),
    "efficientvit_b0": ({}, 64),
    "efficientvit_m0": ({}, 224),
    "caformer_s18": ({}, 64),
    "nextvit_small": ({}, 64),
    "mobilevit_xxs": ({}, 64),
    "crossvit_tiny_240": ({}, 240),
    "tnt_s_legacy_patch16_224": ({"img_size": 32, "depth": 1}, 32),
    "qwen3_vit_88m": ({**_VIT, "img_size": 32}, 32),
    "deepseek_vit_412m": (_VIT, 32),
    "gemma4_vit_167m": ({**_VIT, "position_embedding_size": 128}, 32),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "convnext_atto": ({}, 64),
}
SMALL = {name: small for name, small in SMALL.items() if timm.is_model(name)}


@functools.cache
def build(name: str) -> nn.Module:
    """Build the small model, its weights large enough that a difference shows.

    One for all tests: whoever wraps it must unwrap it again.
    """
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=0, **SMALL[name][0])
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # As much as comes in goes out, so that neither softmax nor activations saturate.
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        elif "gamma" in key:  # timm starts layer scales near zero
            nn.init.ones_(parameter)
    return model.eval()


def images(name: str, count: int = 2) -> torch.Tensor:
    size = SMALL[name][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
