"""The names in a checkpoint of Q-Diffusion, without what its savers put before them."""

from __future__ import annotations

from .errors import QuantTuneError
from .torch_archive import StoredTensor, TensorArchive

FIRST = ".weight_quantizer."
"""After the name of a layer: its quantizer, or that of a split layer's first inputs."""
PREFIXES = ("module.", "_orig_mod.", "model.", "diffusion_model.")
WHOLE = "diffusion_model."
"""Before the UNet's names in the file of a whole pipeline, whose other parts have others."""


def without_prefix(archive: TensorArchive) -> dict[str, StoredTensor]:
    """The tensors by the names that the UNet itself gives them.

    Raises:
        QuantTuneError: no quantizers, or the names of more than one model.
    """
    tensors = archive.tensors
    if not any(".weight_quantizer" in key for key in tensors):
        raise QuantTuneError(
            f"The file {archive.path} is not a checkpoint of Q-Diffusion: no tensor is called "
            f"<layer>{FIRST}delta; load an ordinary model with ComfyUI's own loader and quantize "
            "it."
        )
    cut = True
    while cut:
        quantized = [key for key in tensors if ".weight_quantizer" in key]
        cut = next((p for p in PREFIXES if all(k.startswith(p) for k in quantized)), "")
        if cut == WHOLE:  # what has another name is of the text encoder, the VAE, ...
            tensors = {key: t for key, t in tensors.items() if key.startswith(cut)}
        if cut:
            twice = next((k for k in tensors if k.startswith(cut) and k[len(cut) :] in tensors), "")
            if twice:
                raise _twice(archive.path, twice, twice[len(cut) :])
            tensors = {key.removeprefix(cut): t for key, t in tensors.items()}
    if other := next((key for key in quantized if key.startswith(PREFIXES)), ""):
        plain = next(key for key in quantized if not key.startswith(other.split(".")[0] + "."))
        raise _twice(archive.path, other, plain)
    return dict(tensors)


def _twice(path: str, one: str, other: str) -> QuantTuneError:
    return QuantTuneError(
        f"The file {path} has names of more than one model, {one[:100]!r} and {other[:100]!r}; "
        "choose a checkpoint of one UNet alone."
    )
