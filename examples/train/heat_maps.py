"""Heat maps of the router: the experts' loads over the steps, and which expert reads which kind of text."""

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from examples.train.plots import Records
from examples.train.routing_map import KINDS, Routing

FEW = 100
"""A kind of text with fewer tokens than this is rare."""
LABELLED = 40
"""The largest number of experts whose indices are written below a map."""


def load_figure(records: Records) -> Figure:
    """The loads of the experts over the steps, with a panel for each layer. 1 is an even share."""
    steps = [record["step"] for record in records if "loads" in record]
    loads = np.asarray([record["loads"] for record in records if "loads" in record])
    experts = loads.shape[-1]
    relative = np.moveaxis(loads, 0, -1) * experts  # [layers, experts, records]
    figure = Figure(figsize=(7, 1.2 + 1.5 * len(relative)), layout="constrained")
    panels = figure.subplots(len(relative), 1, sharex=True, squeeze=False)[:, 0]
    colours = ScalarMappable(Normalize(0, 2), "coolwarm")
    for layer, axes in enumerate(panels):
        extent = (0, steps[-1], experts - 0.5, -0.5)
        axes.imshow(colours.to_rgba(relative[layer]), aspect="auto", interpolation="nearest", extent=extent)
        axes.set(ylabel=f"layer {layer + 1}\nexpert")
    panels[-1].set(xlabel="step")
    first, last = relative[..., 0].max(), relative[..., -1].max()
    figure.suptitle(f"The busiest expert reads {first:.1f} x an even share at the start and {last:.1f} x at the end")
    figure.colorbar(colours, ax=panels, label="load / even share")
    return figure


def routing_figure(routing: Routing) -> Figure:
    """Which expert reads which kind of text, with a panel for each layer.

    A cell is the share of a kind's tokens that an expert reads. The experts are sorted by the kind of which they read
    the largest share.
    """
    seen = routing.tokens > 0
    shares, kinds = 100 * routing.shares[:, seen], np.asarray(KINDS)[seen]
    layers, rows, experts = shares.shape
    even = shares[0, 0].sum() / experts
    figure = Figure(figsize=(8, 1.2 + layers * (0.6 + 0.22 * rows)), layout="constrained")
    panels = figure.subplots(layers, 1, squeeze=False)[:, 0]
    colours = ScalarMappable(Normalize(0, shares.max()), "viridis")
    for layer, axes in enumerate(panels):
        order = np.lexsort((-shares[layer].max(axis=0), shares[layer].argmax(axis=0)))
        axes.imshow(colours.to_rgba(shares[layer][:, order]), aspect="auto", interpolation="nearest")
        axes.set_yticks(range(rows), kinds)
        ticks = range(experts) if experts <= LABELLED else []
        axes.set_xticks(ticks, order[list(ticks)], fontsize=7)
        axes.set(title=f"layer {layer + 1}")
    panels[-1].set(xlabel="expert, sorted by the kind of text of which it reads most")
    figure.suptitle(strongest(routing))
    figure.colorbar(colours, ax=panels, label=f"% of tokens (even: {even:.3g} %)")
    return figure


def strongest(routing: Routing) -> str:
    """The largest share of a kind that an expert reads, in words. Rare kinds are left out if others are frequent."""
    frequent = routing.tokens >= min(FEW, routing.tokens.max())
    shares = routing.shares * frequent[:, None]
    layer, kind, expert = np.unravel_index(np.argmax(shares), shares.shape)
    return f"Expert {expert} of layer {layer + 1} reads {100 * shares.max():.0f} % of the {KINDS[int(kind)]}"
