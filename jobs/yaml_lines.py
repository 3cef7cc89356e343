"""YAML with line numbers: safe types only, duplicate keys refused, `1e-4` a number."""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from jobs.errors import RecipeError


@dataclass
class LocatedYaml:
    """Parsed YAML that remembers where each key stood."""

    data: Any
    file: str
    lines: dict[tuple[str, ...], str] = field(default_factory=dict)

    def where(self, location: tuple[str, ...]) -> str:
        """Return `file:line` of a key, or of the nearest section around it that is in the file."""
        for end in range(len(location), 0, -1):
            if location[:end] in self.lines:
                return self.lines[location[:end]]
        return self.file


_SURROGATE = re.compile("[\ud800-\udfff]")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as text; people and YAML 1.2 read a number.

    Aliases are refused: a recipe needs none, and a page of them can unfold to gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.check_event(yaml.AliasEvent):
            mark = self.get_mark()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, file: str, *, mapping: bool = True) -> LocatedYaml:
    """Parse one YAML document; `mapping` demands sections at the top, as a recipe has.

    Raises RecipeError with file, line and reason.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = LocatedYaml(None, file)
        if node is not None:
            _locate(node, (), document)
            document.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{file}:{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{file}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{file}: nested too deeply for a recipe") from error
    if mapping and not isinstance(document.data, dict):
        raise RecipeError(f"{file}: a recipe is a list of `key: value` lines; this is none")
    return document


def _locate(node: yaml.Node, path: tuple[str, ...], document: LocatedYaml) -> None:
    if path:
        document.lines[path] = f"{document.file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
        line = node.start_mark.line + 1
        raise RecipeError(f"{document.file}:{line}: not valid Unicode (a lone surrogate)")
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _locate(item, (*path, str(position)), document)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                raise RecipeError(f"{document.file}:{line}: a key must be a plain word")
            inner = (*path, str(key.value))
            if inner in document.lines:
                line = key.start_mark.line + 1
                raise RecipeError(f"{document.file}:{line}: {'.'.join(inner)} stands here twice")
            _locate(value, inner, document)
