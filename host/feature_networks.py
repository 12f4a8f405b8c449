"""Feature networks that the host or the pack has: CLIP vision, DINOv2, the starter's classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..metrics.features import fitted_square
from ..quant import QuantTuneError
from ..quant.limits import is_finite
from .compat import device_context

STARTER_UNIT = 7.5
"""Root mean square of the classifier's features over the starter's world, which they are divided
by: the cubic kernel of KID wants products near 1, as Inception's are, and drowns in noise else."""


class ClipVisionNetwork:
    """The host's CLIP_VISION: CLIP, SigLIP or DINO; see `metrics.features.FeatureNetwork`.

    Its memory is the host's to manage. Features are the projected embedding where the model has
    one, else the class token; of SigLIP, whose pooling head the host leaves out, the mean token.

    Args:
        clip_vision: what 'Load CLIP Vision' gives.

    Attributes:
        matches_text: whether its features share a space with a text encoder's.
    """

    def __init__(self, clip_vision):
        self.clip_vision = clip_vision
        kind = str(getattr(clip_vision, "model_type", "")).lower()
        self.matches_text = kind.startswith("clip")
        self.similarity = "DINO-I" if kind.startswith("dino") else "CLIP-I"
        self.name = f"CLIP vision input ({kind.removesuffix('_vision_model') or 'unknown model'})"

    def features(self, pictures: Tensor) -> Tensor:
        """``[n, d]`` float32 on the CPU of ``[n, 3, h, w]`` in 0..1."""
        output = self.clip_vision.encode_image(pictures.movedim(1, -1), crop=True)
        embeds = output["image_embeds"]
        if embeds.dim() > 2:
            embeds = embeds.flatten(1, -2).mean(1)
        return embeds.float().cpu()

    def logits(self, features: Tensor) -> None:
        """None: these networks name no classes."""
        return None


class StarterNetwork:
    """The classifier that ships with the starter model: 128 features, shapes as classes.

    For pictures of the starter model's world, or to try the measures with nothing downloaded.
    """

    name = "starter classifier"
    similarity = "classifier features"
    matches_text = False

    def __init__(self):
        from ..starter.classifier import load_classifier

        self.classifier = load_classifier()

    def features(self, pictures: Tensor) -> Tensor:
        """``[n, 128]`` float32 of ``[n, 3, h, w]`` in 0..1."""
        with torch.no_grad():
            return self.classifier.embed(fitted_square(pictures.cpu().float(), 128)) / STARTER_UNIT

    def logits(self, features: Tensor) -> Tensor:
        """Of the picture's shape (star, circle, ...), ``[n, shapes]``."""
        with torch.no_grad():
            return self.classifier.heads["shape"](features * STARTER_UNIT)


def text_embeddings(clip, captions: Sequence[str], width: int | None = None) -> Tensor:
    """Projected text embeddings ``[n, d]`` float32 of captions through the host's CLIP.

    Args:
        width: length of the picture embeddings to compare with, or None.

    Raises:
        QuantTuneError: a text encoder without a projection into the space of pictures, or with
            another one than the pictures' model.
    """
    found = [_pooled(clip, caption, True) for caption in captions]
    if width is not None and found[0].shape[1] != width:
        raise QuantTuneError(
            f"The connected clip gives {found[0].shape[1]} values a text and the clip_vision "
            f"{width} a picture; connect the two halves of one CLIP model (CLIP-L with ViT-L/14, "
            "say).")
    embeddings = torch.cat(found)
    # SD1.5 checkpoints and most clip_l files leave the projection out, and the host's layer then
    # holds what was in memory, mostly zeros; a saved copy of such a model may hold the identity.
    plain = _pooled(clip, captions[0], False)
    norms = embeddings.norm(dim=1)
    if (not is_finite(norms) or float(norms.min()) < 1e-4
            or torch.allclose(plain, embeddings[:1], rtol=1e-3, atol=1e-4)):
        raise QuantTuneError(
            "The connected clip has no projection from text to the space of pictures (SD1.5 "
            "checkpoints and most clip_l files leave it out); load a whole CLIP, such as openai's "
            "clip-vit-large-patch14, with 'Load CLIP'.")
    return embeddings


def _pooled(clip, caption: str, projected: bool) -> Tensor:
    """Embedding ``[1, d]`` of a text, after or before the projection.

    The host's own `encode_from_tokens` gives CLIP-L's before the projection, whatever is asked.
    """
    tokens, model, device = clip.tokenize(caption), clip.cond_stage_model, clip.patcher.load_device
    model.reset_clip_options()
    model.set_clip_options({"projected_pooled": projected})
    clip.load_model(tokens)
    model.set_clip_options({"execution_device": device})
    with device_context(device):
        pooled = model.encode_token_weights(tokens)[1]
    model.reset_clip_options()
    if pooled is None:
        raise QuantTuneError("The connected clip gives no embedding of a whole text; connect a "
                             "CLIP text encoder (CLIP-L, CLIP-G).")
    # Of a caption longer than one chunk the host gives the first chunk's.
    return pooled.float().cpu().reshape(-1, pooled.shape[-1])[:1]
