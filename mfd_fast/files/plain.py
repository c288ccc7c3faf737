"""JSON and YAML of other hands: every key once, and no more memory than a multiple of the file.

PyYAML and json keep the last of two equal keys and say nothing; a setting typed twice would be
lost.  A YAML alias repeats what its anchor named, so that 200 bytes may stand for a billion values.
"""

import json
from pathlib import Path
from typing import Any

MAX_YAML = 1 << 20  # bytes; PyYAML takes about a kilobyte for one


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ``ValueError`` if it is none, or an object has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its lists and objects are nested too deep") from None


def read_json(path: Path) -> Any:
    """The value in a UTF-8 file; ``ValueError`` as :func:`parse_json`, ``OSError`` without one."""
    return parse_json(path.read_text(encoding="utf-8"))


def read_yaml(path: Path) -> Any:
    """The value in a UTF-8 file of plain YAML.

    Raises:
        ValueError: it is not YAML, is larger than 1 MiB, has a key twice, or its aliases stand for
            more values than the file has bytes.
        OSError: there is none.
    """
    import yaml  # here, so that the library itself needs no YAML

    if (size := path.stat().st_size) > MAX_YAML:
        raise ValueError(f"it has {size} bytes, more than the {MAX_YAML} of a YAML file here")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return None
        if _values(root, {}) > size:
            raise ValueError("its aliases stand for more values than it has bytes")
        return loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("its lists and mappings are nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice; leave one")
    return found


def _values(node: Any, counted: dict[int, int]) -> float:
    """How many values a YAML node stands for, each alias counted as what it repeats."""
    if id(node) not in counted:
        counted[id(node)] = float("inf")  # what an alias inside its own anchor finds
        children = node.value if isinstance(node.value, list) else []
        if children and isinstance(children[0], tuple):
            keys: set[tuple[str, str]] = set()
            for key, _ in children:
                if (name := (key.tag, str(key.value))) in keys:
                    line = key.start_mark.line + 1
                    raise ValueError(f"the key {key.value!r} of line {line} is there twice; "
                                     "leave one")  # fmt: skip
                keys.add(name)
            children = [part for pair in children for part in pair]
        counted[id(node)] = 1 + sum(_values(child, counted) for child in children)
    return counted[id(node)]
