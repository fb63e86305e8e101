"""Published models and recipes, as data: one YAML file each, with its source and its quirks in comments."""

from __future__ import annotations

from pathlib import Path

from megagpt.errors import UserError, nearest

_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Every preset that `--preset` takes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The YAML file of a preset. Raises: UserError naming the nearest where there is none."""
    names = preset_names()
    if name in names:
        return _FOLDER / f"{name}.yaml"
    near = nearest(name, names)
    hint = f"did you mean {near}?" if near else "use one of these"
    raise UserError(f"--preset {name} is not known; {hint} (there are {', '.join(names)})")
