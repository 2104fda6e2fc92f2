"""YAML that means one thing: plain values, keys that are text, each once; bounded in size.

Dates stay text: no setting is one. So do 010 and 1:30, which YAML 1.1 reads as 8 and 90. Anchors
and merge keys are read as long as what they stand for is small.
"""

import re

import yaml

_DEEPEST = 20  # levels
_MOST_VALUES = 10_000  # aliases counted as what they stand for
_MERGE = "tag:yaml.org,2002:merge"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OTHER_BASE = re.compile(r"[-+]?0[0-7_]+|.*:.*")  # octal by a mere 0, and base 60


def read(text: str) -> object:
    """The value of one document; None where it is empty. Raises ValueError with one line."""
    loader = None
    try:
        loader = _Loader(text)  # looks for characters that YAML has not
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(_at(mark, error.problem or error.context)) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        if loader is not None:
            loader.dispose()


def _at(mark: yaml.Mark, problem: str) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"


def _refuse(node: yaml.Node, problem: str) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, dates, odd keys and depth."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node, index: object) -> yaml.Node:
        event = self.peek_event()
        if getattr(event, "tag", None):
            _refuse(event, f"tag {event.tag!r} is not read: write plain values")
        if self.depth == _DEEPEST:
            _refuse(event, f"nested deeper than {_DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type, value: str, implicit: object) -> str:
        tag = super().resolve(kind, value, implicit)
        if tag in _NUMBERS and _OTHER_BASE.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return tag

    def construct_scalar(self, node: yaml.Node) -> object:
        value = super().construct_scalar(node)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
            _refuse(node, f"{value!r:.80} holds a NUL or half a surrogate pair")
        return value

    def construct_yaml_int(self, node: yaml.Node) -> int:
        try:
            return super().construct_yaml_int(node)
        except ValueError:  # Python reads no integer of more digits
            _refuse(node, f"a number of {len(node.value):,} digits is beyond reason")


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _count(node: yaml.Node, known: dict[yaml.Node, int | None]) -> int:
    """Values below a node, itself included; checks the keys on the way."""
    if node in known:
        if known[node] is None:
            _refuse(node, "an alias stands for what it stands in")
        return known[node]
    known[node] = None
    below = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        below = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    known[node] = 1 + sum(_count(child, known) for child in below)
    if known[node] > _MOST_VALUES:
        _refuse(node, f"stands for more than {_MOST_VALUES:,} values")
    return known[node]


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if key.tag not in ("tag:yaml.org,2002:str", _MERGE):
            _refuse(key, f"key {getattr(key, 'value', '')!r:.80} is not text: put it in quotes")
        if key.value in seen:
            _refuse(key, f"key {key.value!r:.80} stands twice")
        seen.add(key.value)
