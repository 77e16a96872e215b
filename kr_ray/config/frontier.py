"""The comparison of ways of not sharing the images: accuracy against leak (`kr frontier`)."""

from __future__ import annotations

from pydantic import Field, model_validator

from kr_ray.config.base import Section


class FrontierConfig(Section):
    """What `kr frontier` compares; its options override these keys.

    Protocol of Zhao & Zhang, "Does Training with Synthetic Data Truly Protect Privacy?" (ICLR 2025): the
    worst-case audit (`audit.worst_case`) of all methods on the same canaries, at equal accuracy where asked.
    """

    methods: tuple[str, ...] = ()
    """`teacher`, `kr`, `fixed_generator`, names from `students`, or kinds of students whose defaults do.
    Empty: teacher, kr and all `students`."""
    match_accuracy: float | None = Field(None, gt=0, lt=1)
    """Validation accuracy to which each method with a main key (dp_sgd: its noise) is tuned; the others stay
    as they are."""
    match_method: str = ""
    """Instead of `match_accuracy`: the method whose validation accuracy is the aim."""
    match_trainings: int = Field(8, ge=2)
    """Trainings of the search for that accuracy, at most, for each method."""
    leak_limit: float | None = Field(None, gt=0, lt=1)
    """Largest share of canaries, recognised at 0.1 % false accusations, that the reader accepts; the report
    then recommends the most accurate method below it."""

    @model_validator(mode="after")
    def _names_are_different(self) -> FrontierConfig:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"`methods` must be different, but got {list(self.methods)}; name each once")
        if self.match_accuracy is not None and self.match_method:
            raise ValueError(
                "`match_accuracy` and `match_method` must not both be given, but got "
                f"{self.match_accuracy} and {self.match_method!r}; remove one"
            )
        return self
