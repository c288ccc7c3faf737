"""``mfd-fast completion``: a script that completes commands, presets and settings in a shell.

bash   eval "$(mfd-fast completion bash)"       in ~/.bashrc
zsh    eval "$(mfd-fast completion zsh)"        in ~/.zshrc, after compinit
fish   mfd-fast completion fish | source        in config.fish
"""

from mfd_fast.cli.options import dotted_keys, no_more, positional
from mfd_fast.models import PRESETS
from mfd_fast.run.config import nearest, to_dict

WITH_PRESET = ("distill", "config", "estimate", "profile")

BASH = """_mfd_fast() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [[ " {with_preset} " == *" $command "* ]]; then
    if [ "$COMP_CWORD" -eq 2 ]; then
      COMPREPLY=($(compgen -W "{presets}" -- "$word"))
    else
      case "${{COMP_WORDS[2]}}" in
{settings}
      esac
    fi
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o default -F _mfd_fast mfd-fast
"""
BASH_SETTINGS = '        {preset}) COMPREPLY=($(compgen -W "{keys}" -- "$word"));;'


def completion(argv: list[str]) -> None:
    """Print the script for a shell."""
    shell, rest = positional(argv, "completion", "bash|zsh|fish")
    no_more(rest)
    scripts = {"bash": bash, "zsh": zsh, "fish": fish}
    if shell not in scripts:
        raise ValueError(
            f"shell must be one of {list(scripts)}, got {shell!r}{nearest(shell, scripts)}"
        )
    print(scripts[shell](), end="")


def settings_of(name: str) -> list[str]:
    """Every ``--dotted.key`` of a preset, spelt as on the command line."""
    return [f"--{key.replace('_', '-')}" for key in dotted_keys(to_dict(PRESETS[name]))]


def bash() -> str:
    """For bash."""
    from mfd_fast.cli import COMMANDS

    options = ["--out", "--config", "--objective", "--memory-profile"]
    cases = [
        BASH_SETTINGS.format(preset=name, keys=" ".join([*options, *settings_of(name)]))
        for name in PRESETS
    ]
    return BASH.format(
        commands=" ".join(COMMANDS),
        presets=" ".join(PRESETS),
        with_preset=" ".join(WITH_PRESET),
        settings="\n".join(cases),
    )


def zsh() -> str:
    """For zsh: bash's, through its own emulation."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    """For fish."""
    from mfd_fast.cli import COMMANDS

    lines = [
        f"complete -c mfd-fast -n __fish_use_subcommand -f -a {name} -d {how!r}"
        for name, (_, how) in COMMANDS.items()
    ]
    seen = f"__fish_seen_subcommand_from {' '.join(WITH_PRESET)}"
    lines.append(f"complete -c mfd-fast -n '{seen}' -f -a '{' '.join(PRESETS)}'")
    for name in PRESETS:
        condition = f"__fish_seen_subcommand_from {name}"
        lines += [
            f"complete -c mfd-fast -n '{condition}' -l {key.removeprefix('--')} -r"
            for key in settings_of(name)
        ]
    return "\n".join(lines) + "\n"
