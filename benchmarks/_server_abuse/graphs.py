"""Small graphs for a real server, on the models that ship with the pack."""

from __future__ import annotations

from typing import Any

Graph = dict[str, dict[str, Any]]

SIZE = 64
"""Side of the pictures in pixels: a quarter of the starter's, so that a run takes a moment."""
SCALES = "starter-pip.safetensors"
OTHER_SCALES = "starter-crest.safetensors"
UNET_4BIT = "starter-4bit.safetensors"


class Graphs:
    """Makes graphs (API format).

    Args:
        info: the server's `/object_info`, from which inputs that are not given take their values.
    """

    def __init__(self, info: dict[str, Any]):
        self.info = info

    def node(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """One node, with its defaults for what is not given."""
        values = {}
        for group in ("required", "optional"):
            for name, spec in (self.info[kind]["input"].get(group) or {}).items():
                options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
                choices = spec[0] if isinstance(spec[0], list) else options.get("options")
                if "default" in options:
                    values[name] = options["default"]
                elif choices and group == "required":
                    values[name] = choices[0]
        return {"class_type": kind, "inputs": {**values, **inputs}}

    def starter(self) -> Graph:
        """The starter model and its conditioning: "starter", "pos", "neg" and "latent"."""
        return {
            "starter": self.node("QuantTuneLoadStarterModel"),
            "pos": self.node(
                "CLIPTextEncode", clip=["starter", 1], text="a red star on a blue background"
            ),
            "neg": self.node("CLIPTextEncode", clip=["starter", 1], text=""),
            "latent": self.node("EmptyLatentImage", width=SIZE, height=SIZE, batch_size=1),
        }

    def picture(self, model: list, seed: int, steps: int = 2, save: bool = False) -> Graph:
        """Sampling with the MODEL of a link to a picture, node "image"."""
        kind = "SaveImage" if save else "PreviewImage"
        prefix = {"filename_prefix": "abuse"} if save else {}
        return self.starter() | {
            "sample": self.node(
                "KSampler",
                model=model,
                positive=["pos", 0],
                negative=["neg", 0],
                latent_image=["latent", 0],
                seed=seed,
                steps=steps,
                cfg=5.0,
                sampler_name="euler",
                scheduler="normal",
                denoise=1.0,
            ),
            "decode": self.node("VAEDecode", samples=["sample", 0], vae=["starter", 2]),
            "image": self.node(kind, images=["decode", 0], **prefix),
        }

    def stock(self, seed: int, steps: int = 2) -> Graph:
        """The float starter, without a node of ours behind its loader."""
        return self.picture(["starter", 0], seed, steps)

    def quantized(
        self, seed: int, bits: str = "4", scales: str | None = SCALES, steps: int = 2
    ) -> Graph:
        """Quantize, apply scales, sample."""
        graph = self.picture(["scaled", 0] if scales else ["quantized", 0], seed, steps)
        graph["quantized"] = self.node(
            "QuantTuneQuantizeUNet", model=["starter", 0], bits=bits, range="minmax"
        )
        if scales:
            graph["scaled"] = self.scaled(["quantized", 0], scales)
        return graph

    def loaded(
        self,
        seed: int,
        name: str = UNET_4BIT,
        scales: str | None = None,
        steps: int = 2,
        int8: bool = False,
    ) -> Graph:
        """Load a quantized UNet, apply scales, multiply integers, sample."""
        link = ["load", 0]
        graph = {"load": self.node("QuantTuneLoadQuantizedUNet", unet_name=name)}
        if scales:
            graph["scaled"] = self.scaled(link, scales)
            link = ["scaled", 0]
        if int8:
            graph["int8"] = self.node("QuantTuneDynamicInt8", model=link)
            link = ["int8", 0]
        return self.picture(link, seed, steps) | graph

    def scaled(self, model: list, scales: str) -> dict[str, Any]:
        """'Apply TuneQDM Scales' on a link."""
        return self.node("QuantTuneApplyScales", model=model, scale_name=scales, strength=1.0)

    def upscaled(self, seed: int, steps: int = 2) -> Graph:
        """An empty picture through the small upscaler that ships with the pack."""
        return {
            "up": self.node("QuantTuneLoadUpscaler"),
            "empty": self.node("EmptyImage", width=32, height=32, batch_size=1, color=0x4080C0),
            "upscale": self.node(
                "QuantTuneUpscale4x",
                image=["empty", 0],
                model=["up", 0],
                vae=["up", 2],
                clip=["up", 1],
                prompt="a star",
                steps=steps,
                seed=seed,
            ),
            "image": self.node("PreviewImage", images=["upscale", 0]),
        }

    def trained(self, kind: str, run: str, steps: int = 4, **inputs: Any) -> Graph:
        """One of the trainings ("scales", "lora", "qat") at the node "train"."""
        graph = self.starter() | {
            "quantized": self.node(
                "QuantTuneQuantizeUNet", model=["starter", 0], bits="4", range="minmax"
            )
        }
        if kind == "qat":
            graph["calibrate"] = self.calibrated()
            graph["train"] = self.node(
                "QuantTuneTrainQat",
                model=["calibrate", 0],
                reference=["starter", 0],
                latent=["latent", 0],
                clip=["starter", 1],
                prompts="a red star\na blue ring",
                run_name=run,
                **{"train_steps": steps, "samples": 16, "steps": 4, "batch_size": 1, **inputs},
            )
            graph["show"] = self.node("PreviewImage", images=["train", 1])
            return graph
        names = {"scales": "QuantTuneTrainScales", "lora": "QuantTuneLoraTrain"}
        graph["photos"] = self.node(
            "QuantTuneTrainingImages", folder="starter: pip", resolution=SIZE
        )
        graph["train"] = self.node(
            names[kind],
            model=["quantized", 0],
            images=["photos", 0],
            clip=["starter", 1],
            vae=["starter", 2],
            run_name=run,
            **{"steps": steps, "preview_every": 0, "seed": 1, **inputs},
        )
        graph["show"] = self.node("PreviewImage", images=["train", 2])
        return graph

    def calibrated(self) -> dict[str, Any]:
        """'Calibrate INT8' of the float starter, in the least time."""
        return self.node(
            "QuantTuneCalibrateInt8",
            model=["starter", 0],
            latent=["latent", 0],
            clip=["starter", 1],
            prompts="a red star\na blue ring",
            samples=8,
            steps=4,
        )
