"""Presets that predict what another network makes of the image: features, clusters, captions."""

from __future__ import annotations

from maskdistill.masking.base import Masker
from maskdistill.masking.multiblock import MultiBlockMasker
from maskdistill.masking.ratios import Ratio
from maskdistill.masking.rectangles import SingleBlockMasker, SquaresMasker
from maskdistill.masking.similarity import ClusterMasker
from maskdistill.presets.preset import ROUNDS_DOWN, Paper, Preset


def capi(ratio: Ratio = 0.65) -> Preset:
    """Show one block, shifted around the edges, and drop the rest.

    >>> import maskdistill as md
    >>> md.presets.capi().student_global
    SingleBlockMasker(0.65, inverse=True).rolled()

    Args:
        ratio: share of patches to drop.

    Source: Darcet et al., "Cluster and Predict Latents Patches for Improved Masked Image
    Modeling", 2025.
    """
    return Preset(
        student_global=SingleBlockMasker(ratio, inverse=True).rolled(),
        global_crops=1,
        name="capi",
        title="CAPI",
        apply="drop",
        objectives=("clusters",),
        objective="cross-entropy of hidden patches with the teacher's assignment to clusters",
        paper=Paper(
            "Cluster and Predict Latents Patches for Improved Masked Image Modeling",
            "Darcet et al.",
            "2025",
            "2502.08769",
            "https://github.com/facebookresearch/capi/tree/98b4fa17ee8eec8810c17022df9a27a44845368b",
        ),
        hides="All but one rectangle of the grid, which is then shifted around the edges by a "
        "random offset, so that no place is hidden more often than another. The hidden patches are "
        "dropped and predicted by a separate network that looks at the visible ones.",
        defaults={
            "mask_ratio": "0.65",
            "aspect": "0.5 to 2, log-uniform as far as the grid admits",
            "shift": "on, for both axes",
            "predicted patches": "0.05 of the hidden ones (`prediction_subsampling`)",
            "crops": "1 of scale 0.6 to 1",
        },
        differences=(ROUNDS_DOWN + " On 14x14 both hide 127.",),
        arguments={"ratio": ratio},
        local_views=False,
    )


def ijepa(ratio: float | None = 0.6) -> Preset:
    """Show a large block less four smaller ones, which are to be predicted.

    >>> import maskdistill as md
    >>> md.presets.ijepa().student_global
    MultiBlockMasker().exactly(0.6)
    >>> md.presets.ijepa(None).student_global
    MultiBlockMasker()

    Args:
        ratio: trim or top up each mask at random to this share, so that every row hides the same
            number and its tokens can be dropped; 0.6 is about what the masks hide on average. None
            leaves them as they are drawn.

    Source: Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive
    Architecture", 2023.
    """
    masker: Masker = MultiBlockMasker()
    return Preset(
        student_global=masker if ratio is None else masker.exactly(ratio),
        global_crops=1,
        name="ijepa",
        title="I-JEPA",
        apply="drop",
        objectives=("latent",),
        objective="squared error of the teacher's features of the target blocks",
        paper=Paper(
            "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture",
            "Assran et al.",
            "CVPR 2023",
            "2301.08243",
            "https://github.com/facebookresearch/ijepa/tree/"
            "52c1ae95d05f743e000e8f10a1f3a79b10cff048",
        ),
        hides="All but the context: a large square block less four target blocks, which may "
        "overlap each other. The context is encoded, the targets are predicted one by one; "
        "`MultiBlockMasker().draw_blocks(...)` returns them with the context.",
        defaults={
            "targets": "4 blocks of scale 0.15 to 0.2, aspect 0.75 to 1.5",
            "context": "1 square block of scale 0.85 to 1, without the targets",
            "least context": "more than 10 patches (`min_keep`), else it is drawn again",
        },
        differences=(
            "Blocks reach the last row and column. The authors draw a block's place with an "
            "exclusive upper end, so that it never does; on 14x14 their context block is always "
            "the upper left 13x13. Not reproduced.",
            "A block's scale and aspect are independent. The authors use one random number for "
            "both, so that larger targets are always the taller ones. Not reproduced.",
            "Every image has block sizes of its own. The authors draw them once per batch.",
            "Rows are made equally long at random places, so that tokens can be dropped. The "
            "authors cut longer rows to the shortest of the batch, at the lower right. "
            "`ijepa(None)` leaves the masks as they are drawn, 37 to 85 % hidden.",
            "A context that is too small is drawn anew 20 times and then the best is taken; the "
            "authors then give up the targets one after the other.",
        ),
        evidence=(
            "The form of the mask decides: with 1 % of ImageNet's labels, ViT-B/16 after 300 "
            "epochs gives 54.2 % with these blocks, 20.2 % with one block, 17.6 % with random "
            "patches, 15.5 % with rasterised quadrants (the paper's table 6).",
        ),
        arguments={"ratio": ratio},
        local_views=False,
    )


def data2vec2(ratio: Ratio = 0.8) -> Preset:
    """Show a few squares and drop the rest; several masks serve each image.

    >>> import maskdistill as md
    >>> preset = md.presets.data2vec2()
    >>> preset.student_global
    SquaresMasker(0.8, inverse=True)
    >>> preset.student_global.several(16, batch=4, grid=(14, 14)).shape
    torch.Size([4, 16, 196])

    Args:
        ratio: share of patches to drop.

    Source: Baevski et al., "Efficient Self-supervised Learning with Contextualized Target
    Representations for Vision, Speech and Language", 2023.
    """
    return Preset(
        student_global=SquaresMasker(ratio, inverse=True),
        global_crops=1,
        name="data2vec2",
        title="data2vec 2.0",
        apply="drop",
        objectives=("latent",),
        objective="squared error of the teacher's features, averaged over its layers, at the "
        "hidden patches",
        paper=Paper(
            "Efficient Self-supervised Learning with Contextualized Target Representations for "
            "Vision, Speech and Language",
            "Baevski et al.",
            "ICML 2023",
            "2212.07525",
            "https://github.com/facebookresearch/fairseq/tree/"
            "3d262bb25690e4eb2e7d3c1309b1e9c406ca4b99",
        ),
        hides="All but the patches of some squares of 3 x 3 at random places, which may overlap. "
        "Single patches are then shown or hidden at random until the number is exact. One pass of "
        "the teacher serves 16 masks of the same image.",
        defaults={
            "mask_prob": "0.8",
            "squares": "3 x 3, 5 of them on 14x14",
            "mask_prob_adjust": "0.07 of the grid is drawn in excess, since squares overlap",
            "clone_batch": "16 masks per image: `.several(16, ...)`",
        },
        differences=(
            ROUNDS_DOWN + " On 14x14 both show 39.",
            "Any grid will do; the authors' code takes square ones.",
            "The noise that the authors put in the place of hidden patches before their "
            "convolutional decoder is the decoder's affair, and not here.",
        ),
        evidence=(
            "Matches MAE on ImageNet in a sixteenth of the time for training (abstract: 16.4 "
            "times), by all of its measures together, of which the masks are one.",
        ),
        arguments={"ratio": ratio},
        local_views=False,
    )


def cluster(ratio: Ratio = 0.5) -> Preset:
    """Drop regions of one look.

    >>> import maskdistill as md
    >>> md.presets.cluster().student_global
    ClusterMasker(0.5)

    Args:
        ratio: share of patches to drop.

    Source: Wei et al., "Efficient Vision-Language Pre-training by Cluster Masking", 2024.
    """
    return Preset(
        student_global=ClusterMasker(ratio),
        global_crops=1,
        name="cluster",
        title="Cluster masking",
        apply="drop",
        objectives=("clip",),
        objective="contrast of images with their captions",
        paper=Paper(
            "Efficient Vision-Language Pre-training by Cluster Masking",
            "Wei et al.",
            "CVPR 2024",
            "2405.08815",
            "https://github.com/Zi-hao-Wei/"
            "Efficient-Vision-Language-Pre-training-by-Cluster-Masking/tree/"
            "6fe5bff58e977c5875eb935ebe7cf327907d18d1",
        ),
        hides="A few random patches, the anchors, and whatever looks like one of them: whole "
        "regions of one colour or texture.",
        defaults={
            "anchors": "0.03 of the patches",
            "likeness": "cosine of the patches' pixels, each patch normalised by itself",
            "target_mask_ratio": "0.5 on average over images",
            "min_mask_ratio": "0.3 for every image, by random patches",
        },
        differences=(
            "Every image hides exactly the ratio, its patches most like an anchor, so that tokens "
            "can be dropped. The authors use one threshold for all images, and an attention mask; "
            "`ClusterMasker(0.5, exact=False)` draws so.",
            "The authors' search for the threshold is not called in their published code, which "
            "uses the target ratio as the threshold instead. Here the threshold is sought.",
            "Patches that fill an image up to the least ratio are drawn uniformly. In the authors' "
            "code the noise for that is applied to the wrong patches, so that the last ones of the "
            "grid are taken. Not reproduced.",
            "The change from pixels to embeddings over training is not here: give "
            '`ClusterMasker(0.5, signal="features")` the embeddings.',
        ),
        arguments={"ratio": ratio},
        teacher=False,
        local_views=False,
    )
