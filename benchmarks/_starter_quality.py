"""The starter model as a ruler: what a changed model loses, on prompts nobody trained on."""

from __future__ import annotations

SAMPLING = {"steps": 20, "cfg": 5.0, "sampler": "dpmpp_2m", "scheduler": "karras"}
CALIBRATION_PROMPTS, JUDGED_PROMPTS = 160, 8
REFERENCES = 2000
"""Pictures of the generator that FID compares with."""
FIRST_REFERENCE = 7_000_000
"""Seed of the first of them."""


class StarterQuality:
    """The starter, its float pictures, and the measures.

    - error: of the model's output against the float model's, relative, over forwards that a
      sampler makes (both guidance rows, all noise levels),
    - SSIM (torchmetrics): of each picture with the float model's from the same noise and prompt,
    - feature distance: one minus the cosine of their features, in the classifier that was trained
      on the starter's generator, times 1,000: what LPIPS is for photographs,
    - FID: of those features, against pictures of the generator's held-out triples,
    - obeys: share of pictures that show the shape, colour and background of their prompt.

    Args:
        images: pictures to judge by, a held-out prompt each.

    Attributes:
        model, clip, vae: the starter, in float32.
        conditioning: ``(positive, negative)`` to calibrate on, of prompts that are not judged.
        latent: the host's LATENT to calibrate at.
    """

    def __init__(self, images: int):
        import torch

        from quanttune.host.calibrate import Calibration
        from quanttune.host.observe import ForwardRecord
        from quanttune.host.samples import Samples, conditioning_of
        from quanttune.starter.classifier import load_classifier
        from quanttune.starter.evaluate import held_out_prompts
        from quanttune.starter.load import load_starter

        self.model, self.clip, self.vae = load_starter()
        self.judge = load_classifier()
        kept = CALIBRATION_PROMPTS + JUDGED_PROMPTS
        prompts = held_out_prompts(kept + images)
        texts = [text for _, text in prompts]
        self.conditioning = conditioning_of(
            self.clip, "\n".join(texts[:CALIBRATION_PROMPTS]), None, None)
        self.scenes, self.prompts = [s for s, _ in prompts[kept:]], texts[kept:]
        self.latent = {"samples": torch.zeros(1, 4, 16, 16)}
        unseen = conditioning_of(self.clip, "\n".join(texts[CALIBRATION_PROMPTS:kept]), None, None)
        samples = Samples(self.latent, *unseen, Calibration(samples=160, seed=7000, **SAMPLING))
        self.record = ForwardRecord(lambda number: number % 3 == 1)
        with self.record.recording(self.model.model.diffusion_model):
            for index in range(len(samples)):
                samples.run(self.model, index)
        self._floats = self._references = None

    @property
    def settings(self) -> dict:
        """What its numbers depend on; only those of equal settings can be compared."""
        return {"images": len(self.prompts), "calibration_prompts": CALIBRATION_PROMPTS,
                "judged_prompts": JUDGED_PROMPTS, "references": REFERENCES, **SAMPLING}

    def measure(self, model) -> dict[str, float]:
        """Every measure of a MODEL of the same family."""
        import comfy.model_management
        import torch
        from torchmetrics.functional.image import structural_similarity_index_measure

        from quanttune.metrics.sets import frechet_distance
        from quanttune.starter.evaluate import obedience

        comfy.model_management.load_models_gpu([model])
        error = self.record.error(model)
        if self._floats is None:
            self._floats = self.pictures(self.model)
            self._references = self._embed(_generated())
        made = self.pictures(model)
        ssim = structural_similarity_index_measure(made, self._floats, data_range=1.0)
        ours, floats = self._embed(made), self._embed(self._floats)
        cosine = torch.nn.functional.cosine_similarity(ours, floats, dim=1)
        obeyed = obedience(self.scenes, made.movedim(1, -1).numpy(), self.judge)
        return {"error": error, "ssim": float(ssim),
                "distance": float(1000 * (1 - cosine).mean()),
                "fid": frechet_distance(ours, self._references), "obeys": obeyed["all"]}

    def pictures(self, model):
        """A picture of each prompt, ``[n, 3, H, W]``."""
        import torch

        from quanttune.starter.evaluate import generate

        made = generate(model, self.clip, self.vae, self.prompts, seed=9000)
        return torch.from_numpy(made).movedim(-1, 1)

    def _embed(self, pictures):
        import torch

        return torch.cat([self.judge.embed(part) for part in pictures.split(100)])


def _generated():
    """Pictures of the generator, ``[n, 3, H, W]`` in 0..1, of triples that were held out."""
    import numpy as np
    import torch

    from quanttune.starter.generator import render, sample

    drawn = [render(sample(FIRST_REFERENCE + i, held=True)) for i in range(REFERENCES)]
    return torch.from_numpy(np.stack(drawn)).movedim(-1, 1).float() / 255
