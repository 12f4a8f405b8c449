"""Train the scale sets that ship with the starter: one subject, N experts, a plain loop.

Run with ``python dev.py python starter/train_scales.py --subject NAME``. The same 4-bit starter,
pictures, seed and steps give the same file. The full trainer, with resume, previews and prior
preservation, is a node of its own; this is the smallest loop that eq. 5-6 of TuneQDM need.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from quanttune.quant import (
    LayerScales,
    QuantSpec,
    ScaleMetadata,
    ScaleSet,
    save_quantized_unet,
    save_scale_set,
)
from quanttune.starter.common import prepare_host

HERE = Path(__file__).resolve().parent


def read_subject(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """The pictures ``[n, H, W, 3]`` in 0..1 of a subject folder and their captions."""
    paths = sorted(folder.glob("*.png"))
    pictures = [np.asarray(Image.open(p).convert("RGB"), np.float32) / 255 for p in paths]
    return (torch.from_numpy(np.stack(pictures)),
            [p.with_suffix(".txt").read_text().strip() for p in paths])


class ScaleParameters(torch.nn.Module):
    """One trainable ``r_out`` and ``s_in`` vector per layer and expert, all starting at 1."""

    def __init__(self, shapes: dict[str, tuple[int, int]], num_experts: int):
        super().__init__()
        self.names = list(shapes)
        self.r_out = torch.nn.ParameterList(
            torch.nn.Parameter(torch.ones(1, shapes[n][0])) for _ in range(num_experts)
            for n in self.names)
        self.s_in = torch.nn.ParameterList(
            torch.nn.Parameter(torch.ones(1, shapes[n][1])) for _ in range(num_experts)
            for n in self.names)

    def expert(self, index: int) -> dict[str, LayerScales]:
        """The trainable scales of one expert by layer name."""
        at = index * len(self.names)
        return {n: LayerScales(self.r_out[at + i], self.s_in[at + i])
                for i, n in enumerate(self.names)}

    def parameters_of(self, index: int) -> list[torch.nn.Parameter]:
        """The same as a list, for an optimizer of this expert alone."""
        span = slice(index * len(self.names), (index + 1) * len(self.names))
        return [*self.r_out[span], *self.s_in[span]]


class Expert:
    """Routes every forward to one set of trainable scales."""

    def __init__(self, scales: dict[str, LayerScales]):
        self.scales = scales

    def resolve(self, timesteps: torch.Tensor) -> dict[str, LayerScales]:
        """The scales, whatever the timesteps."""
        return self.scales


def train(model, clip, vae, pictures, captions, num_experts, steps, batch, rate, seed, log=print):
    """Minimise the noise-prediction loss of ``model`` over its scales; returns a ScaleSet.

    Every step trains one expert on timesteps of its own interval, in turn, with an optimizer of
    its own, so that no expert is moved by another's momentum.
    """
    import comfy.model_management

    from quanttune.host.build import quantized_model
    from quanttune.host.routing import OPTION, layer_shapes

    comfy.model_management.load_models_gpu([model])
    base, unet = model.model, model.model.diffusion_model
    with torch.no_grad():
        latents = base.process_latent_in(vae.encode(pictures)).float()
        context = torch.cat([clip.encode_from_tokens(clip.tokenize(c)) for c in captions])
    parameters = ScaleParameters(layer_shapes(unet), num_experts)
    optimizers = [torch.optim.AdamW(parameters.parameters_of(i), lr=rate, weight_decay=0.0)
                  for i in range(num_experts)]
    generator = torch.Generator().manual_seed(seed)
    sampling, losses = base.model_sampling, []
    span = sampling.num_timesteps / num_experts
    for step in range(steps):
        expert = step % num_experts
        t = ((expert + torch.rand(batch, generator=generator)) * span).long()
        rows = torch.randint(len(latents), (batch,), generator=generator)
        noise = torch.randn(batch, *latents.shape[1:], generator=generator)
        sigma = sampling.sigmas[t].view(-1, 1, 1, 1)
        noised = latents[rows] + sigma * noise
        denoised = base.apply_model(
            noised, sigma.flatten(), c_crossattn=context[rows],
            transformer_options={OPTION: Expert(parameters.expert(expert))})
        loss = (((noised - denoised) / sigma - noise) ** 2).mean()
        optimizers[expert].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.parameters_of(expert), 1.0)
        optimizers[expert].step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            log(f"step {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f}")
    layers = {name: LayerScales(
        torch.cat([parameters.expert(e)[name].r_out.detach() for e in range(num_experts)]),
        torch.cat([parameters.expert(e)[name].s_in.detach() for e in range(num_experts)]))
        for name in parameters.names}
    quantized = quantized_model(model)
    bits = max(w.bits for w in quantized.checkpoint.layers.values())
    return ScaleSet(layers, num_experts, sampling.num_timesteps, ScaleMetadata(
        base_fingerprint=quantized.fingerprint, base_name=quantized.name, steps=steps, seed=seed,
        bits=bits))


def quantized_starter(bits: int):
    """The starter quantized to ``bits``, written to ``starter/quanttune`` and loaded from there."""
    from quanttune.host.build import load_model, quantized_model
    from quanttune.host.quantize import quantize_model
    from quanttune.starter.load import load_starter

    path = HERE / "quanttune" / f"starter-{bits}bit.safetensors"
    model, clip, vae = load_starter()
    model, report = quantize_model(model, QuantSpec(bits, range="mse"), name="starter")
    print(report)
    checkpoint = quantized_model(model).checkpoint
    path.parent.mkdir(parents=True, exist_ok=True)
    save_quantized_unet(path, checkpoint.layers, checkpoint.floats, checkpoint.metadata)
    return load_model(str(path), path.name), clip, vae


def main(argv=None):
    """Quantize the starter, train one subject's scales on it, write both beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subject", required=True)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)

    prepare_host("cuda" if torch.cuda.is_available() else "cpu")
    model, clip, vae = quantized_starter(options.bits)
    pictures, captions = read_subject(HERE / "subjects" / options.subject)
    scales = train(model, clip, vae, pictures, captions, options.experts, options.steps,
                   options.batch, options.rate, options.seed)
    scales = replace(scales, metadata=replace(scales.metadata, subject=options.subject))
    out = options.out or HERE / "quanttune_scales" / f"starter-{options.subject}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_scale_set(out, scales)
    print(f"{scales.num_parameters:,} scales in {out.name}")


if __name__ == "__main__":
    main()
