"""Training of ordinary weights or adapters, the opponents of the benchmarks' scales."""

from __future__ import annotations


def train_weights(denoiser, data, parameters: list, config) -> None:
    """Train ``parameters`` of a denoiser on the examples, timesteps and noise that scales get.

    Args:
        denoiser: `training.trainer.Denoiser` that predicts noise.
        data: `TrainingSet`.
        parameters: leaves of its model.
        config: `ScaleTraining`; its steps, batch, seed, learning rate and schedule count.
    """
    import torch

    from quanttune.training.objective import denoising_loss, loss_weight
    from quanttune.training.optimizers import rate_factor
    from quanttune.training.sampling import ExampleOrder, TimestepSampler, generator_of

    order = ExampleOrder(data.buckets(), config.batch_size, config.seed)
    draw = TimestepSampler(1, denoiser.num_timesteps, (0.0, 1.0), True, config.seed)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    factor = rate_factor(config)
    for step in range(config.steps):
        clean, conditions = data.batch(order.batch(step))
        noise = torch.randn(clean.shape, generator=generator_of(config.seed, "noise", 0, step))
        sigma = denoiser.sigma(draw.timesteps(step, len(clean)))
        out = denoiser.denoise(denoiser.noised(clean, noise, sigma), sigma, conditions, {})
        loss = denoising_loss(clean, out, loss_weight("eps", sigma)).mean()
        optimizer.param_groups[0]["lr"] = config.learning_rate * factor(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for p in parameters:
        p.requires_grad_(False)
