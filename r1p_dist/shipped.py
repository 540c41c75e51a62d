"""Where the files lie that come with the package but not in its folder: recipes, DeepSpeed configurations, clusters.

In a checkout they stand at the top level, where people look for them; a wheel carries them inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT_FOLDERS = {"recipes": "launchers/recipes", "ds_configs": "ds_configs", "clusters": "launchers/clusters"}


def shipped_files(folder: str, suffix: str) -> dict[str, Path]:
    """Return name without suffix -> path of every file in `recipes`, `ds_configs` or `clusters`, sorted by name."""
    root = checkout()
    root = _PACKAGE / folder if root is None else root / _CHECKOUT_FOLDERS[folder]
    return {path.stem: path for path in sorted(root.glob(f"*{suffix}"))}


def checkout() -> Path | None:
    """Return the folder of the checkout that the package is in; None where it was installed from a wheel."""
    # Only a wheel has recipes inside the package, so their presence decides; site-packages is never searched.
    return None if (_PACKAGE / "recipes").is_dir() else _PACKAGE.parent
