"""Learning-rate schedules: a linear warm-up, then one of four shapes."""

import optax

from biomamba_jax.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """Return the learning rate of each of `steps` steps, counted from 0.

    "cosine" and "linear" decay from the end of the warm-up to `final_fraction` of the peak; "wsd" (warm-up, stable,
    decay; arXiv 2404.06395) stays at the peak for `stable_fraction` of the run and then decays as a cosine; "constant"
    never decays.

    Args:
      config: shape and fractions.
      peak: learning rate at the end of the warm-up.
      steps: optimizer steps of the run.
    """
    warmup = round(config.warmup_fraction * steps)
    rest = steps - warmup
    final = config.final_fraction
    # The first step has a rate of peak / warmup, not 0.
    shapes: list[optax.Schedule] = [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))]
    boundaries = [warmup]
    match config.kind:
        case "cosine":
            shapes.append(optax.cosine_decay_schedule(peak, max(rest, 1), final))
        case "linear":
            shapes.append(optax.linear_schedule(peak, peak * final, max(rest, 1)))
        case "wsd":
            stable = round(config.stable_fraction * steps)
            shapes += [optax.constant_schedule(peak), optax.cosine_decay_schedule(peak, max(rest - stable, 1), final)]
            boundaries.append(warmup + stable)
        case "constant":
            shapes.append(optax.constant_schedule(peak))
    return optax.join_schedules(shapes, boundaries)
