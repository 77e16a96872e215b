"""From a template of this folder to a page that needs nothing else."""

from __future__ import annotations

from typing import Any

from kr_ray.report import words
from kr_ray.report.guarantees import bound_words, epsilon_words, terms
from kr_ray.report.schema import Report


def render(template: str, report: Report, **context: Any) -> str:
    """The page with its style inlined; everything but that style is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("kr_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": words.percent, "points": words.points, "count": words.count, "duration": words.duration,
        "date": words.date, "work": words.work, "images_of": words.images_of, "confirmed": words.confirmed,
        "apart": words.checkpoints_apart, "bound": bound_words, "epsilon": epsilon_words, "terms": terms,
    }  # fmt: skip
    source = environment.loader.get_source(environment, "style.css")[0] if environment.loader else ""
    style = Markup(source + _margins(report))
    return environment.get_template(template).render(report=report, style=style, **context)


def _margins(report: Report) -> str:
    """What every printed page carries: the run's name and the page's number."""
    return (
        f"@page {{ @bottom-left {{ content: {css_string(f'{report.run}, {words.date(report.created)}')}; }}\n"
        '  @bottom-right { content: "page " counter(page) " of " counter(pages); } }\n'
    )


def css_string(text: str) -> str:
    """`text` as a CSS string; whatever is not a plain letter or digit is written as its number, so that
    nothing ends the string."""
    plain = "".join(
        character
        if character.isascii() and (character.isalnum() or character in " -_.,:")
        else f"\\{ord(character):x} "
        for character in text
    )
    return f'"{plain}"'
