"""Settings of diffusers' JSON files in the host's terms; what the host cannot be told is refused.

Nothing computes quietly with something else than the file says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..quant import QuantTuneError
from .lora_keys import brief

PREDICTIONS = {"v_prediction": "V_PREDICTION", "epsilon": "EPS"}
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear"}
"""Names of noise schedules in diffusers, and what the host calls the same. It has a name for
``squaredcos_cap_v2``, too, and fails when a model is built with it."""
NO_SCHEDULE = ("a schedule of the noise that ComfyUI cannot sample with; load the model with "
               f"diffusers, or choose one that was trained with {' or '.join(SCHEDULES)}")
UNET_FIXED = {
    "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5, "flip_sin_to_cos": True,
    "freq_shift": 0, "center_input_sample": False, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "class_embeddings_concat": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "dual_cross_attention": False, "cross_attention_norm": None,
    "attention_type": "default", "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "resnet_out_scale_factor": 1,
    "time_embedding_type": "positional", "time_embedding_dim": None,
    "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "num_attention_heads": None,
}
"""What every UNet of Stable Diffusion is in the host, whatever its sizes."""


@dataclass(frozen=True)
class Settings:
    """The settings of one JSON file.

    Attributes:
        values: key to what the file says.
        where: what to call the file in messages, "The file …".
        cannot: what follows a setting that the host cannot follow, "which … cannot be; do this".
    """

    values: Mapping[str, Any]
    where: str
    cannot: str

    def wrong(self, key: str, value: Any, cannot: str = "") -> QuantTuneError:
        """The error for a setting that the host cannot follow, and what is said of it."""
        return QuantTuneError(f"{self.where} says {key} = {brief(value, 60)}, "
                              f"{cannot or self.cannot}.")

    def expect(self, wanted: Mapping[str, Any]) -> None:
        """Refuse a setting that is there and is not what the host computes with."""
        for key, value in wanted.items():
            if self.values.get(key, value) != value:
                raise self.wrong(key, self.values[key])

    def numbers(self, key: str, count: int | None, default: int | None = None,
                most: int | None = None) -> list[int]:
        """Whole numbers above 0: one for all ``count`` of them, or a list of as many."""
        value = self.values.get(key)
        value = default if value is None else value
        values = list(value) if isinstance(value, (list, tuple)) else [value] * (count or 0)
        if not values or (count is not None and len(values) != count) or not all(
                type(n) is int and 0 < n <= (most or 2**16) for n in values):
            raise self.wrong(key, value)
        return values

    def heads(self, widths: list[int]) -> dict[str, int]:
        """The host's ``num_heads`` and ``num_head_channels`` of a UNet.

        ``attention_head_dim`` is the number of heads there, whatever its name
        (huggingface/diffusers#2011).

        Args:
            widths: ``block_out_channels``.
        """
        key = "attention_head_dim"
        counts = self.numbers(key, len(widths), default=8)
        if any(width % count for width, count in zip(widths, counts)):
            raise self.wrong(key, self.values.get(key))
        if len(set(counts)) == 1:
            return {"num_heads": counts[0], "num_head_channels": -1}
        sizes = {width // count for width, count in zip(widths, counts)}
        if len(sizes) > 1:
            raise self.wrong(key, self.values[key])
        return {"num_heads": -1, "num_head_channels": sizes.pop()}

    def schedule(self) -> tuple[str, dict[str, Any]]:
        """What a UNet predicts, and its noise schedule, in the host's names."""
        prediction = PREDICTIONS.get(str(self.values.get("prediction_type", "epsilon")))
        if prediction is None:
            raise self.wrong("prediction_type", self.values["prediction_type"])
        self.expect({"num_train_timesteps": 1000, "trained_betas": None})
        kind = self.values.get("beta_schedule", "linear")
        if not isinstance(kind, str) or kind not in SCHEDULES:
            raise self.wrong("beta_schedule", kind, NO_SCHEDULE)
        start, end = self.values.get("beta_start", 0.0001), self.values.get("beta_end", 0.02)
        for key, value in (("beta_start", start), ("beta_end", end)):
            if not isinstance(value, float) or not 0 < value < 1:
                raise self.wrong(key, value)
        sampling = {"linear_start": start, "linear_end": end}
        if kind != "scaled_linear":
            sampling["beta_schedule"] = SCHEDULES[kind]
        if self.values.get("rescale_betas_zero_snr") is True:
            sampling["zsnr"] = True
        return prediction, sampling
