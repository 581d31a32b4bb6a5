"""The text of a recipe, YAML or JSON, as plain values. A mapping that has a key twice is refused.

PyYAML and json keep the last value of such a key without a message.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_limited

MAX_BYTES = 2**17  # PyYAML needs seconds for more
MAX_VALUES = 100_000  # of a YAML document with its aliases expanded


def read_recipe_text(file: Path) -> Any:
    """Return the content of a recipe file, unchecked.

    Raises:
        InvalidInputError: The file cannot be read or parsed, or a mapping in it has a key twice.
    """
    is_json = file.suffix == ".json"
    try:
        content = read_limited(file, MAX_BYTES, "a recipe")
    except OSError as error:
        raise InvalidInputError(f"{file}: the recipe cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object) if is_json else yaml_value(text)
    except InvalidInputError as error:
        raise InvalidInputError(f"{file}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "YAML"
        raise InvalidInputError(f"{file}: not valid {kind} ({' '.join(str(error).split())[:200]})") from error


def yaml_value(text: str) -> Any:
    """Return a YAML document as plain values.

    Raises:
        yaml.YAMLError: It is not valid YAML.
        InvalidInputError: A mapping has a key twice, or aliases repeat parts of it too often.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}) > MAX_VALUES:  # the values that refer to each other are small, their text is not
            raise InvalidInputError(f"aliases expand it to more than {MAX_VALUES} values; write the parts out")
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    finally:
        loader.dispose()


def _expanded_size(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node has if each alias stands for a copy; infinity if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is counted
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in inner for part in pair]
        known[id(node)] = 1 + sum(_expanded_size(part, known) for part in inner)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # here and not in construct_mapping: a merge key (<<) that is already expanded looks like repeated keys
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        found = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in found:
                    raise _repeated(key.value, f" (line {key.start_mark.line + 1})")
                found.add((key.tag, key.value))
        return node


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _repeated(key)
        found[key] = value
    return found


def _repeated(key: str, where: str = "") -> InvalidInputError:
    return InvalidInputError(f"key '{key}' is given twice{where}; keep one of them")
