"""Operands of the experts' products in FP8, and how near their rounding was to another code."""

import numpy as np

from tests.oracle.formats import E4M3_VALUES, blocks_of, fp8_block

BLOCK, LARGEST, LEAST_OF_ROWS = 128, 448, 1e-30
CODES = np.sort(E4M3_VALUES[:127])  # the positive ones
MIDPOINTS = (CODES[1:] + CODES[:-1]) / 2


def fp8(matrix, format, **settings):
    """The values of a matrix [N, K] in float64 after it was rounded to a block format."""
    codes, scales = fp8_block(np.float32(matrix), format == "fp8_block_pow2", **settings)
    values = E4M3_VALUES[codes]
    for i, j, where in blocks_of(matrix, settings.get("n_block", BLOCK), BLOCK):
        values[where] *= scales["block"][i, j]
    return values


def weights(precision, experts, nudge):
    """w_in and w_out as forward products read them, and as input gradients do: there, gate and up share blocks.

    `nudge` changes values that were rounded, as in `Rounding`.
    """
    fwd, dgrad = (None, None) if precision is None else (precision.fwd, precision.dgrad)
    given = experts["w_in"], experts["w_out"]

    def encoded(weight, format, parts):
        if format is None:
            return weight
        matrices = weight.reshape(*weight.shape[:2], parts, -1).swapaxes(1, 2)  # blocks are square: [K, N] will do
        values = nudge(np.stack([[fp8(part, format) for part in of_expert] for of_expert in matrices]))
        return values.swapaxes(1, 2).reshape(weight.shape)

    parts = 2 if given[0].ndim == 4 else 1
    forward = encoded(given[0], fwd, parts), encoded(given[1], fwd, 1)
    return forward, tuple(encoded(weight, dgrad, 1) for weight in given)


class Rounding:
    """Rounds rows to a format, or to none, and remembers them.

    `nudge` changes values that were rounded. A small change of a layer's inputs does not: most codes stay the same.
    """

    def __init__(self, nudge=lambda values: values):
        self.seen, self.nudge = [], nudge

    def __call__(self, row, format):
        if format is None:
            return row
        self.seen += [(np.abs(row.reshape(-1)[i : i + BLOCK]), format) for i in range(0, row.size, BLOCK)]
        return self.nudge(fp8(row.reshape(1, -1), format, n_block=1, least=LEAST_OF_ROWS).reshape(row.shape))

    @property
    def margin(self) -> float:
        """The least of `distance` over all blocks. Another precision has the same codes if its rounding is far below.

        It is scaled so that 16 roundings of float32 are about `cases.MARGIN`.
        """
        return 20 * min((distance(*block) for block in self.seen), default=np.inf)


def distance(sizes, format) -> float:
    """How far a block's numbers are from others at which a code or a power-of-two scale changes, over the largest."""
    largest = sizes.max()
    if largest < LEAST_OF_ROWS:
        return np.inf
    scale, of_scale = largest / LARGEST, np.inf
    if format == "fp8_block_pow2":
        power = np.log2(scale)
        scale, of_scale = 2.0 ** np.ceil(power), abs(power - np.rint(power))
    places = np.searchsorted(MIDPOINTS, sizes / scale)
    near = [MIDPOINTS[np.clip(places + side, 0, len(MIDPOINTS) - 1)] for side in (-1, 0)]
    return min(of_scale, np.abs(np.stack(near) * scale - sizes).min() / largest)
