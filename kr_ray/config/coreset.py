"""Configuration of coresets. Imports neither torch nor ray."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kr_ray.config.methods import MainKey, MethodSection

SelectionName = Literal["random", "forgetting", "herding", "k_center", "el2n", "grand", "entropy"]


class CoresetSection(MethodSection):
    """A classifier of a part of the real images, selected by what one training on all of them shows.

    The selection training is shared by all coresets of a run (or of a run of the audit) of the same
    `selection_epochs`; `random` needs none.
    """

    kind: Literal["coreset"] = "coreset"
    selection: SelectionName = "random"
    """`forgetting`: those that a network most often answers wrongly after having answered rightly (Toneva et
    al. 2019). `herding`: those whose mean feature follows the class's (Welling 2009). `k_center`: those that
    leave no image far from a selected one (Sener & Savarese 2018). `el2n`, `grand`: the largest error, or
    gradient of the last layer (Paul et al. 2021). `entropy`: the least certain."""
    fraction: float = Field(0.5, gt=0, le=1)
    """Of the training images that are selected."""
    balance: bool = True
    """The same fraction of every class, at least an image; else of the whole set, whatever the class."""
    epochs: int = Field(500, ge=1)
    """Passes over the selected images."""
    selection_epochs: int = Field(40, ge=1)
    """Passes over all images of the training that the selection looks at; MixUp is off in it, for a mixed
    image has no class that it could forget."""
    never_learned: Literal["max", "zero"] = "max"
    """`forgetting`: images that were never answered rightly are the most forgotten ones (`max`; Toneva et
    al.) or were never forgotten (`zero`; DeepCore, Guo et al. 2022). Where a network does not memorise, the
    two select opposite images."""
    scored: Literal["early", "end"] = "early"
    """`el2n`, `grand`: after a quarter of the selection training, or at its end."""

    def main_key(self) -> MainKey:
        return MainKey(name="fraction", low=0.01, high=1.0, rising=True, start=self.fraction)
