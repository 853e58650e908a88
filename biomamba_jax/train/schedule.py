"""Learning-rate schedules: a linear warm-up, then a small named choice of shape."""

import optax

from biomamba_jax.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, steps: int) -> optax.Schedule:
    """The learning rate of each of `steps` steps, counted from 0.

    The shapes end at `final_fraction` of the peak: "cosine" and "linear" fall from the end of the warm-up, "wsd"
    (warm-up, stable, decay; arXiv 2404.06395) stays at the peak for `stable_fraction` of the run and then falls as a
    cosine, "constant" never falls.
    """
    warmup = round(config.warmup_fraction * steps)
    rest = steps - warmup
    final = config.final_fraction
    # The first step already moves: its rate is peak / warmup, not 0.
    pieces: list[optax.Schedule] = [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))]
    borders = [warmup]
    match config.kind:
        case "cosine":
            pieces.append(optax.cosine_decay_schedule(peak, max(rest, 1), final))
        case "linear":
            pieces.append(optax.linear_schedule(peak, peak * final, max(rest, 1)))
        case "wsd":
            stable = round(config.stable_fraction * steps)
            pieces += [optax.constant_schedule(peak), optax.cosine_decay_schedule(peak, max(rest - stable, 1), final)]
            borders.append(warmup + stable)
        case "constant":
            pieces.append(optax.constant_schedule(peak))
    return optax.join_schedules(pieces, borders)
