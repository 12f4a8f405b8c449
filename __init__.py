"""ComfyUI-QuantTune: run, fine-tune and personalise diffusion models in 4 or 8 bits.

ComfyUI imports this folder by path and asks :func:`comfy_entrypoint` for the nodes. Nothing else
happens at import, so that the same folder can be imported as the package ``quanttune`` by tests,
benchmarks and the command line without a ComfyUI around it.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the ComfyUI extension that lists every node of the pack."""
    from .nodes import QuantTuneExtension

    return QuantTuneExtension()
