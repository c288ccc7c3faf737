"""A command is a typed function; tyro makes its options, its help and its errors from that.

A command of settings takes them as ``config``: every field is an option without a prefix.  What
they start from, a preset or a run, is read from the command line first, so that ``--help`` and
errors tell the values, the methods and the short names of what was typed.
"""

import contextlib
import inspect
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Annotated, Any, Union, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
)

from mfd_fast.baselines.config import ObjectiveName
from mfd_fast.models import PRESETS
from mfd_fast.run.config import RunConfig, leaves, nearest, to_dict, with_settings
from mfd_fast.settings import Settings, check_range, ranges

# setting -> its short name
SHORT = {"distill.objective": "--objective"} | {
    key.removeprefix("--").replace("-", "_"): short
    for config in PRESETS.values()
    for short, key in config.SHORT.items()
}
# setting of some methods alone -> these methods; every other one is named as its method
OF_METHODS = {"distill.dmd2": ("dmd2", "senseflow"), "distill.score_weighting": ("vsd",)}
HELP = {"-h", "--help"}
ANSI = re.compile(r"\x1b\[[\d;]*m")
# tyro's words -> ours
WORDING = (
    (r"^Error parsing (config\S*: )?", ""),
    (r"(no type matching .*)?invalid literal for int.*: (?=')", "expected a whole number, got "),
    (r"(no type matching .*)?could not convert string to float: ", "expected a number, got "),
    (r"Missing value for argument '(\S+)'. Expected 1 values.", r"\1 expects a value"),
)  # fmt: skip


def words(metavar: str, nargs: Any = (0, 1)) -> PrimitiveConstructorSpec:
    """An option of text whose value may be left out, ``""`` then; ``nargs="*"``: of many words."""
    return PrimitiveConstructorSpec(
        nargs=nargs,
        metavar=metavar,
        instance_from_str=" ".join,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [value] if value else [],
    )


Config = tyro.conf.arg(name="")
Switch = tyro.conf.FlagCreatePairsOff[bool]
Optional = tyro.conf.DisallowNone  # of a type or None: shown as the type
Fixed = tyro.conf.Suppress[tyro.conf.Fixed[str]]


@dataclass(frozen=True)
class Places:
    """The settings of a finished run, of which only those that say where files lie are options."""

    located: RunConfig


@dataclass(frozen=True)
class Command:
    """A function of the command line.

    names: of its subcommands, with a sentence each; ``noun``: what such a name is.
    base: the settings that its ``config`` starts from, ``base(name, **options typed)``.
    """

    run: Callable[..., None]
    noun: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    base: Callable[..., Any] | None = None

    @property
    def text(self) -> str:
        """Its docstring's sentence and example."""
        return inspect.cleandoc(self.run.__doc__).partition("\n\nArgs:")[0]

    @property
    def sentence(self) -> str:
        """The first of its docstring."""
        return self.text.partition("\n")[0]

    def ready(self, name: str, config: Any = None) -> Callable[..., Any]:
        """The function for one of the ``names``, to be parsed."""
        known = {"config": config or self.base(name)} if self.base else {}
        if "name" in inspect.signature(self.run).parameters:
            known["name"] = name
        return partial(_later(self.run), **known)

    def parse(self, name: str, argv: list[str], prog: str) -> Callable[[], None]:
        """What is to be done; ``ValueError`` in one sentence, ``SystemExit`` after ``--help``."""
        argv = [part for word in argv for part in _split(word)]
        config = None
        if self.base:
            own = None
            with contextlib.suppress(ValueError):
                rest = [word for word in argv if word not in HELP]
                own = self._bound(self.ready(name), rest, prog, return_unknown_args=True)
            try:
                config = self.base(**{"name": name, **own.keywords}) if own else None
            except (ValueError, OSError):
                if not HELP & set(argv):
                    raise
        return self._bound(self.ready(name, config), argv, prog)

    def _bound(self, function: Callable[..., Any], argv: list[str], prog: str, **how: Any) -> Any:
        done = _tyro(function, argv, prog, **how)
        for option, limits in ranges(self.run).items():
            if (value := done.keywords[option]) is not None:
                check_range(limits, value, f"--{option.replace('_', '-')}")
        return done


def command(**about: Any) -> Callable[[Callable[..., None]], Command]:
    """Make a function a command with subcommands or settings."""
    return lambda run: Command(run, **about)


def listed(sentences: Mapping[str, str]) -> Any:
    """The type of subcommands that tyro's help lists; nothing of them is imported."""
    return _union(_subcommand(*about, lambda: lambda: None) for about in sentences.items())


def completed(commands: Mapping[str, Command]) -> Any:
    """The type of all that a shell completes: commands, their names, the settings of each."""

    def of(known: Command) -> Any:
        return _union(
            _subcommand(name, sentence, partial(known.ready, name))
            for name, sentence in known.names.items()
        )

    return _union(
        Annotated[of(known), tyro.conf.subcommand(name, description=known.sentence)]
        if known.names
        else _subcommand(name, known.sentence, partial(known.ready, ""))
        for name, known in commands.items()
    )


def _subcommand(name: str, sentence: str, make: Callable[[], Callable[..., Any]]) -> Any:
    about = tyro.conf.subcommand(name, description=sentence, constructor_factory=make)
    return Annotated[Any, about]


def _union(types: Any) -> Any:
    return Union[(*types, Annotated[None, tyro.conf.Suppress])]  # of one type it would be none


def show(kind: Any, argv: list[str], prog: str, description: str) -> None:
    """tyro's help or completion of subcommands; ends in ``SystemExit``."""
    tyro.cli(kind, args=argv, prog=prog, description=description, registry=rules())


def _later(function: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    @wraps(function)
    def later(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return partial(function, *args, **kwargs)

    return later


def _split(word: str) -> list[str]:
    return word.split("=", 1) if re.match(r"--[\w.-]+=[^-]", word) else [word]


def rules() -> ConstructorRegistry:
    """How settings become options: with their short names, without those of other methods and the
    preset's name; of a finished run only where its files lie.
    """
    registry, is_asked = ConstructorRegistry(), False

    @registry.struct_rule
    def settings(info: Any) -> StructConstructorSpec | None:
        nonlocal is_asked
        if is_asked or not (isinstance(info.type, type) and issubclass(info.type, Settings)):
            return None
        is_asked = True
        plain = ConstructorRegistry.get_struct_spec(info)
        is_asked = False
        section, fields = info.type.SECTION, []
        for one in plain.fields:
            key = section + one.name
            if key == "preset" or not _is_of_method(key, info.default):
                continue
            if key in SHORT:
                one = replace(one, type=Annotated[one.type, tyro.conf.arg(aliases=(SHORT[key],))])
            fields.append(one)
        return StructConstructorSpec(partial(replace, info.default), tuple(fields))

    @registry.struct_rule
    def places(info: Any) -> StructConstructorSpec | None:
        if info.type is not Places:
            return None
        config = info.default.located
        fields = tuple(
            StructFieldSpec(key, str, value, "Where it lies now, or the device to use.")
            for key, value in leaves(to_dict(config))
            if key in (*config.PATHS, "train.device")
        )
        return StructConstructorSpec(lambda **moved: Places(with_settings(config, moved)), fields)

    return registry


def _is_of_method(key: str, config: Any) -> bool:
    section, _, name = key.partition(".")
    methods = OF_METHODS.get(key, (name,) if name in get_args(ObjectiveName) else ())
    return section != "distill" or not methods or config.objective in methods


def _tyro(function: Callable[..., Any], argv: list[str], prog: str, **how: Any) -> Any:
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            done = tyro.cli(function, args=argv, prog=prog, registry=rules(), **how)
            return done[0] if how else done
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(complaint(box.getvalue(), prog)) from None


def complaint(box: str, prog: str) -> str:
    """The sentence in tyro's box: what was typed, what is expected, what is near."""
    lines = [line[2:].rstrip(" │") for line in ANSI.sub("", box).splitlines()[1:-1]]
    ruled = [n for n, line in enumerate(lines) if line and set(line) <= {"─", "-"}]
    start = 1 if ruled[:1] == [0] else 0  # without UTF-8 the title is a line of its own
    said = lines[start : next((n for n in ruled if n >= start), None)]
    text = " ".join(" ".join(said).split())
    if text.startswith("Missing from"):
        wanted = [line.strip() for line in said if re.match(r" {4}\S", line)]
        return f"expected {prog} {' '.join(wanted)}; {prog} --help shows an example"
    if text.startswith("Unrecognized"):
        near = [line.split()[0] for line in lines if re.match(r" {4}-", line)]
        return _unknown(re.search(r"(?<=: )\S[^,]*", text)[0], near, prog)
    if found := re.search(r"choice '(.*)' for argument '(\S+)'. Expected .*\((.*)\)", text):
        value, option, known = found.groups()
        known = re.findall(r"'(.*?)'", known)
        return f"{option} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}"
    for theirs, ours in WORDING:
        text = re.sub(theirs, ours, text)
    return f"{text.rstrip('. ')}; {prog} --help lists the options"


def _unknown(word: str, near: list[str], prog: str) -> str:
    section = re.match(r"--distill\.(\w+)\.", word)
    methods = OF_METHODS.get(f"distill.{section[1]}", section.groups()) if section else ()
    if set(methods) <= set(get_args(ObjectiveName)) and methods:
        hint = f"; it belongs to --objective {' or '.join(methods)}"
    else:
        hint = f"; did you mean {' or '.join(map(repr, near[:3]))}?" if near else ""
    return f"unknown option {word!r}; {prog} --help lists the options{hint}"
