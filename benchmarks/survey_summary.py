"""What a survey says over all its products: how good the picked tiles are, who is fastest, and how torch compares."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Sequence

PEER = "torch_grouped_mm"


@dataclasses.dataclass(frozen=True)
class Compared:
    """One product of a survey.

    Attributes:
        name: its shape and pass.
        picked: the key, backend/tile, that `auto` takes.
        ours: milliseconds of each of our tiles that ran, by key.
        peer: milliseconds of torch; None if it did not run.
    """

    name: str
    picked: str
    ours: dict[str, float]
    peer: float | None

    @property
    def fastest(self) -> str:
        """The key of our fastest tile."""
        return min(self.ours, key=lambda key: self.ours[key])


def summary(products: Sequence[Compared]) -> list[str]:
    """Lines of text. A ratio leaves out products of which one side did not run."""
    products = [product for product in products if product.ours]
    if not products:
        return []
    auto = [product for product in products if product.picked in product.ours]
    beside = [product for product in products if product.peer is not None]
    lines = [f"summary of {len(products)} products:"]
    lines += _line("auto / fastest of ours", [(p.ours[p.picked] / p.ours[p.fastest], _choice(p)) for p in auto])
    lines += _line(f"auto / {PEER}", [(p.ours[p.picked] / p.peer, p.name) for p in auto if p.peer is not None])
    lines += _line(
        f"fastest of ours / {PEER}", [(p.ours[p.fastest] / p.peer, p.name) for p in beside if p.peer is not None]
    )
    if lost := [product.name for product in products if product.picked not in product.ours]:
        lines.append(f"  the tile of auto was not timed in {len(lost)}: {', '.join(lost)}")
    backends = collections.Counter(product.fastest.split("/")[0] for product in products)
    lines.append("  fastest backend: " + ", ".join(f"{name} {count}" for name, count in backends.most_common()))
    return lines


def _choice(product) -> str:
    return f"{product.name}: {product.picked}, fastest {product.fastest}"


def _line(what, ratios: list[tuple[float, str]]) -> list[str]:
    """The median, the 90th percentile (the least value that 90 % do not exceed) and the worst of some ratios."""
    if not ratios:
        return []
    ratios = sorted(ratios)
    values = [ratio for ratio, _ in ratios]
    most, where = ratios[-1]
    return [
        f"  {what}: median {statistics.median(values):.3f}, 90 % {values[math.ceil(0.9 * len(values)) - 1]:.3f}, "
        f"worst {most:.3f} ({where}), above 1 in {sum(value > 1 for value in values)} of {len(values)}"
    ]
