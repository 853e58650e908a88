"""The one table of tolerances: how far an op may lie from its float64 oracle, for each dtype of its inputs.

Both figures are relative to the largest magnitude of the expected array, max|got - want| <= tolerance * max|want|, and
in the tests of single channels and heads to the largest magnitude of each one's slice.
They follow from the rounding of the dtype and are never loosened to make a test pass.
"""

from typing import NamedTuple


class Tolerance(NamedTuple):
    value: float
    gradient: float


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    ("selective_scan", "float64"): Tolerance(1e-12, 1e-11),
    ("selective_scan", "float32"): Tolerance(1e-5, 1e-5),
    ("selective_scan", "bfloat16"): Tolerance(2**-7, 2**-7),  # fp32 inside: one rounding of the result
    ("causal_conv1d", "float64"): Tolerance(1e-12, 1e-11),
    ("causal_conv1d", "float32"): Tolerance(1e-5, 1e-5),
    ("causal_conv1d", "bfloat16"): Tolerance(2**-7, 2**-7),
    ("ssd", "float64"): Tolerance(1e-12, 1e-11),
    ("ssd", "float32"): Tolerance(1e-5, 1e-5),
    # Rounded factors in every product, and their products rounded again; the gradient of A sums terms of both signs.
    ("ssd", "bfloat16"): Tolerance(2**-6, 2**-5),
    ("rotary_embedding", "float32"): Tolerance(1e-6, 1e-6),
    ("rotary_embedding", "bfloat16"): Tolerance(2**-8, 2**-8),  # float32 inside: one rounding of the result
    ("linear_cross_entropy", "float64"): Tolerance(1e-12, 1e-11),
    ("linear_cross_entropy", "float32"): Tolerance(1e-5, 1e-5),
    ("linear_cross_entropy", "bfloat16"): Tolerance(2**-7, 2**-7),  # float32 logits from products of rounded factors
}
