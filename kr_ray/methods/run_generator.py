"""The run's generator as a part (section 3.2)."""

from __future__ import annotations

from pathlib import Path

from kr_ray.config import Config
from kr_ray.config.privacy import asks_the_generator, fitted_to
from kr_ray.data.store import SPLITS_FILE, load_stored_splits
from kr_ray.generators.checkpoints import train_generator
from kr_ray.generators.interface import Generator, PrivateGenerator
from kr_ray.methods.interface import Part, Site
from kr_ray.methods.private_run import fitted
from kr_ray.runs.results import GeneratorResult
from kr_ray.runs.stages import Save, State


def generator_after(config: Config) -> tuple[str, ...]:
    """A private generator, or one whose images the teacher is asked about, has no teacher to watch it."""
    return ("data",) if config.privacy or asks_the_generator(config) else ("data", "teacher")


def generator_part(site: Site, generator: Generator, share: float = 1.0) -> Part[GeneratorResult]:
    """Section 3.2. The teacher only watches for collapse. `share` of
    the run's generator stage is what it costs."""

    def work(folder: Path, state: State | None, save: Save) -> GeneratorResult | None:
        own = with_noise(site, generator)
        return train_generator(site.path, folder, own, seed=site.seed, state=state, save=save)

    return Part(
        name="generator",
        inputs=[generator.section, *fitted_to(site.config, "generator", generator.section)],
        after=generator_after(site.config),
        result=GeneratorResult,
        work=work,
        costs=("generator", share),
    )


def with_noise(site: Site, generator: Generator) -> Generator:
    """A private generator that leaves its noise open, with the noise that the run's target asks for."""
    if not isinstance(generator, PrivateGenerator):
        return generator
    records = len(load_stored_splits(site.path / SPLITS_FILE).train)
    return generator.with_section(fitted(site.config, "generator", generator.section, records))
