"""The house in numbers: lines, rooms, arrows, circles, the longest class, settings, commands.

    python scripts/house_numbers.py [CHECKOUT]    # standard library only; nothing is imported

A room is a folder or a file at the top of the package; an arrow is a room that imports another, in
a function too; a circle is files that need each other at their import, what a type checker reads
left out.  Lazy circles also go through imports in functions: a preset names the task it is read by.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(sys.argv[1]).resolve() if sys.argv[1:] else Path(__file__).resolve().parents[1]
AREAS = {"package and kernels": ("mfd_fast", "kernels"), "csrc": ("csrc",)}
AREAS |= {name: (name,) for name in ("bench", "studies", "tests", "scripts")}


def sources(folder, *suffixes):
    """Files of a folder, links left out."""
    found = [path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    return [p for p in found if not any(q.is_symlink() for q in (p, *p.parents))]


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return name if name.startswith("mfd_fast") else f"mfd_fast.{name}"


FILES = [*sources("mfd_fast", ".py"), *sources("kernels", ".py")]
TREES = {dotted(path): ast.parse(path.read_text()) for path in FILES}
NODES = [node for tree in TREES.values() for node in ast.walk(tree)]
CLASSES = {node.name: node for node in NODES if isinstance(node, ast.ClassDef)}
MADE = {name: " ".join(map(ast.unparse, node.decorator_list)) for name, node in CLASSES.items()}
DATA = {name: node for name, node in CLASSES.items() if "dataclass" in MADE[name]}


def imports(node, *, lazy):
    """Modules that a tree imports, submodules by their own name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and not lazy:
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in TREES else child.module for name in names)
        yield from imports(child, lazy=lazy)


def graph(*, lazy):
    return {
        name: {m for m in imports(tree, lazy=lazy) if m in TREES} - {name}
        for name, tree in TREES.items()
    }


GRAPH = graph(lazy=True)


def circles(graph):
    """Files that reach themselves."""
    for name in graph:
        seen, new = set(), graph[name]
        while new:
            seen |= new
            new = set().union(*(graph[one] for one in new)) - seen
        if name in seen:
            yield name


def settings(name):
    """Dotted keys of a configuration, from the annotations of its class and of those it extends."""
    for base in map(ast.unparse, DATA[name].bases):
        yield from settings(base) if base in DATA else ()
    for field in (node for node in DATA[name].body if isinstance(node, ast.AnnAssign)):
        kind, key = ast.unparse(field.annotation), field.target.id
        if kind in DATA:
            yield from (f"{key}.{inner}" for inner in settings(kind))
        elif "ClassVar" not in kind:
            yield key


for title, folders in AREAS.items():
    kinds = (".h", ".cpp", ".cu", ".cuh") if title == "csrc" else (".py",)
    texts = [path.read_text() for folder in folders for path in sources(folder, *kinds)]
    lines = sum(len(text.splitlines()) for text in texts)
    print(f"{title:<20} {len(texts):>4} files {lines:>7,} lines")
rooms = {name: name.split(".")[1] for name in TREES if "." in name and "__main__" not in name}
arrows = {(rooms[a], rooms.get(b, rooms[a])) for a in rooms for b in GRAPH[a]}
num_arrows = sum(one != other for one, other in arrows)
hard = sorted(circles(graph(lazy=False)))
length, longest = max((node.end_lineno - node.lineno + 1, name) for name, node in CLASSES.items())
runs = [name for name, node in DATA.items() if "RunConfig" in map(ast.unparse, node.bases)]
given = {ast.unparse(n.target): n.value for n in NODES if isinstance(n, ast.AnnAssign)}
keys = {key for name in runs for key in settings(name)}
print(f"rooms at the top     {len({*rooms.values()})}, arrows {num_arrows}")
print(f"files in circles     {len(hard)} {' '.join(hard)}")
print(f"in lazy circles      {len([*circles(GRAPH)])}")
print(f"longest class        {longest}, {length} lines")
print(f"settings, commands   {len(keys)}, {len(given['COMMANDS'].keys)}")
