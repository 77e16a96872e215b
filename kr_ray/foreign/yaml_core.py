"""YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3), as a
configuration and `--set` are written in it.

PyYAML reads YAML 1.1, in which 010 is 8, 12:30 is 750, `on` is true and 1e-5 is text. Here PyYAML only finds
the nodes; what a plain scalar means is decided by the core schema's own patterns. Of 1.1 one thing is kept,
merge keys (`<<: *other`), because configurations use it and nothing else could be meant. Every alias becomes
a copy of its own.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

import yaml

TAG = "tag:yaml.org,2002:"
PATTERNS = (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("merge", r"<<"),
)
LONGEST_NUMBER = 100
Values = dict[str, Any]
"""A mapping as plain values."""
MOST_NODES = 20_000
"""With every alias counted as often as it is used: few lines of aliases of aliases could fill any memory."""


class YamlError(ValueError):
    """The text is not YAML that can be used. The message says where, what and the remedy."""


class _Nodes(yaml.BaseLoader):
    """PyYAML's parser with the core schema's tags for plain scalars."""


_Nodes.yaml_implicit_resolvers = {}
for _name, _pattern in PATTERNS:
    _Nodes.add_implicit_resolver(TAG + _name, re.compile(rf"^(?:{_pattern})$"), None)  # type: ignore[no-untyped-call]


class _Writer(yaml.SafeDumper):
    """PyYAML's, which puts in quotes what YAML 1.1 does not read as
    text; here also what the core schema does not."""


for _name, _pattern in PATTERNS:
    _Writer.add_implicit_resolver(TAG + _name, re.compile(rf"^(?:{_pattern})$"), None)  # type: ignore[no-untyped-call]


def write_yaml(value: Any, *, for_people: bool = False) -> str:
    """Plain values as block YAML, the same to a reader of YAML 1.1 and to one of the core schema.

    Args:
        for_people: letters beyond ASCII as they are, and longer lines.
    """
    text: str = yaml.dump(
        value, Dumper=_Writer, sort_keys=False, allow_unicode=for_people, width=100 if for_people else 80
    )
    return text


def read_yaml(text: str) -> Any:
    """Numbers, text, booleans, None, lists and dicts with keys of text.

    Raises:
        YamlError: no YAML, a key written twice, a tag of another schema, or aliases without an end.
    """
    node = _compose(text)
    return None if node is None else _Plain().value(node)


def read_value(text: str) -> Any:
    """The value of `--set KEY=VALUE`. It has no comments: "my runs #1" is text to its end.

    Raises:
        YamlError: see `read_yaml`; or a `#` within a list, mapping or quoted text would begin a comment.
    """
    if "#" not in text and "\n" not in text:
        return read_yaml(text)
    try:
        node, cut = _compose(text), _has_comment(text)
    except YamlError as error:
        raise YamlError(f"{error} (` #` begins a comment)") from error
    if node is None or (isinstance(node, yaml.ScalarNode) and node.style is None):
        whole = yaml.ScalarNode(
            _Nodes("").resolve(yaml.ScalarNode, text.strip(), (True, False)), text.strip()
        )
        return _Plain().value(whole)
    if cut:
        raise YamlError(
            "` #` begins a comment, which would cut the value; put the text that holds it in quotes"
        )
    return _Plain().value(node)


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Nodes)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = (
            f"{error.context}, {error.problem}"
            if str(error.problem).startswith("but ")
            else error.problem or error.context
        )
        raise YamlError(f"{where}{said}; correct it, or put text in quotes") from error
    except yaml.reader.ReaderError as error:
        found = f"character 0x{error.character:02x}" if isinstance(error.character, int) else "a byte"
        raise YamlError(f"{found} at position {error.position} may not stand in YAML; remove it") from error
    except RecursionError as error:
        raise YamlError("lists or mappings lie too deeply within each other; write fewer brackets") from error


def _has_comment(text: str) -> bool:
    """Whether a comment stands between two tokens or at the end."""
    position = 0
    for token in yaml.scan(text, _Nodes):
        if "#" in text[position : token.start_mark.index]:
            return True
        position = max(position, token.end_mark.index)
    return "#" in text[position:]


class _Plain:
    """Plain values of nodes, whose number is counted."""

    def __init__(self) -> None:
        self.nodes = 0
        self.open: set[int] = set()

    def value(self, node: yaml.Node) -> Any:
        self.nodes += 1
        if self.nodes > MOST_NODES:
            _refuse(
                node,
                f"there are more than {MOST_NODES:,} values, each alias counted as often as it is used",
                "use fewer",
            )
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if id(node) in self.open:
            _refuse(node, "an alias stands for something that holds it", "write the values out")
        self.open.add(id(node))
        try:
            return self._mapping(node) if isinstance(node, yaml.MappingNode) else self._sequence(node)
        except RecursionError as error:
            raise YamlError(
                "lists or mappings lie too deeply within each other; write fewer brackets"
            ) from error
        finally:
            self.open.discard(id(node))

    def _sequence(self, node: yaml.Node) -> list[Any]:
        _check_tag(node, "seq")
        return [self.value(item) for item in node.value]

    def _mapping(self, node: yaml.Node) -> Values:
        _check_tag(node, "map")
        own: Values = {}
        merged: Values = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse(key, "a key is a list or mapping", "use text for keys")
            if key.tag == f"{TAG}merge":
                merged = self._merged(value) | merged
            elif key.value in own:
                _refuse(key, f"key {key.value!r} is written twice", "keep one")
            else:
                own[_text(key)] = self.value(value)
        return merged | own

    def _merged(self, node: yaml.Node) -> Values:
        """What `<<` adds: a mapping, or several, of which the earlier win."""
        merged: Values = {}
        for part in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(part, yaml.MappingNode):
                _refuse(part, "`<<` must be given a mapping, or a list of them", "write <<: *name")
            merged = self.value(part) | merged
        return merged


def _scalar(node: yaml.ScalarNode) -> Any:
    kind = node.tag.removeprefix(TAG)
    if kind == "str" or node.tag == "!":
        return _text(node)
    if kind == "merge":  # anywhere but as a key it is text
        return node.value
    pattern = dict(PATTERNS).get(kind)
    if pattern is None or not re.fullmatch(pattern, node.value):
        _refuse(node, f"{node.value[:40]!r} is no value of the tag {node.tag[:40]!r}", "remove the tag")
    if len(node.value) > LONGEST_NUMBER:
        _refuse(node, f"a number has {len(node.value)} digits", "use a smaller one")
    return {"null": lambda text: None, "bool": lambda text: text[0] in "tT", "int": _int, "float": _float}[
        kind
    ](node.value)


def _int(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _text(node: yaml.ScalarNode) -> str:
    if any("\ud800" <= c <= "\udfff" for c in node.value):
        _refuse(node, "text holds half of a character (a lone surrogate)", "write the character itself")
    return str(node.value)


def _check_tag(node: yaml.Node, kind: str) -> None:
    if node.tag not in (TAG + kind, "!"):
        _refuse(node, f"the tag {node.tag[:40]!r} is not known", "remove it")


def _refuse(node: yaml.Node, what: str, remedy: str) -> NoReturn:
    mark = node.start_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    raise YamlError(f"{where}{what}; {remedy}")
