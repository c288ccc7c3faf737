"""``mfd-fast config``: what a run would be started with."""

from mfd_fast.cli.options import positional, preset_config
from mfd_fast.run.config import to_dict


def config(argv: list[str]) -> None:
    """Print a preset with the given settings applied, as YAML that ``--config`` reads."""
    import yaml

    name, rest = positional(argv, "config", "PRESET")
    resolved = preset_config(name, rest, "config")
    print(yaml.safe_dump(to_dict(resolved), sort_keys=False), end="")
