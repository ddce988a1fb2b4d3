"""Figures of masks, attention and training, returned and never shown."""

from maskdistill.plotting import style
from maskdistill.plotting.attention import (
    plot_attention,
    plot_attention_heads,
    plot_attention_strip,
)
from maskdistill.plotting.curves import (
    plot_curves,
    plot_intervals,
    plot_occlusion,
    plot_training_bands,
)
from maskdistill.plotting.masks import plot_masker, plot_view_masks
from maskdistill.plotting.pixels import attention_pixels, masked_pixels, outlined_pixels

__all__ = [
    "attention_pixels",
    "masked_pixels",
    "outlined_pixels",
    "plot_attention",
    "plot_attention_heads",
    "plot_attention_strip",
    "plot_curves",
    "plot_intervals",
    "plot_masker",
    "plot_occlusion",
    "plot_training_bands",
    "plot_view_masks",
    "style",
]
