"""Every tolerance of the numerics tests, by dtype and quantity, and the ways of comparing that they belong to.

Each is some five times what was seen on the small networks used here, whose hidden states are of order 1. The wrong
variants in `test_qformer_wrong_variants` miss the float32 ones by a factor of `WRONG_BY` and more.
"""

import torch

# Means of frames, by two orders of summation.
FLOAT32_MEAN = 1e-6
# Hidden states and memories of two forms of one network: largest difference, absolute.
FLOAT32_HIDDEN = 2e-5
# Gradients: largest difference over the largest entry of the parameter's gradient.
FLOAT32_GRADIENT = 3e-5
# A key bias adds the same to every score of a query, so its gradient is zero in theory and rounding in practice:
# largest entry over the largest of the same layer's key weight.
FLOAT32_KEY_BIAS = 2e-5
# Scalar losses and scores: relative.
FLOAT32_LOSS = 1e-5
# A whole network against the class it was taken from: relative to the largest entry.
FLOAT32_NETWORK = 1e-5

# A slope against the central difference over 2e-3, in float32: relative, absolute below 1.
SLOPE = 1e-2

# bfloat16 keeps 8 bits. Root mean square of the difference over that of the value: single entries may stray when a
# near tie between merges falls the other way.
BFLOAT16_HIDDEN = 0.03
BFLOAT16_GRADIENT = 0.1
# Between two bfloat16 forms: how much further from float32 the clip form may be than the frame loop.
BFLOAT16_EXCESS = 2.0

# The mean of a factor over some 1e5 numbers that are each rounded to bfloat16: relative.
BFLOAT16_SCALE = 2e-4

# A wrong variant must miss the float32 tolerances by this factor.
WRONG_BY = 100


def largest_difference(actual, expected):
    """Largest absolute difference; NaN and a difference in shape count as infinite."""
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.numel():
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    return float("inf") if difference != difference else difference


def relative_difference(actual, expected):
    """Largest absolute difference over the largest entry of `expected`; 0 / 0 is 0."""
    difference = largest_difference(actual, expected)
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    return difference / scale if scale else difference


def rms_difference(actual, expected):
    """Root mean square of the difference over that of `expected`; lists of tensors are taken as one."""
    actual = torch.cat([part.double().flatten() for part in actual])
    expected = torch.cat([part.double().flatten() for part in expected])
    return ((actual - expected).norm() / expected.norm()).item()
