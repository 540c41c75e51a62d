"""Where the files lie that come with the package but not in its folder: recipes, DeepSpeed configurations, clusters.

In a checkout they stand at the top level, where people look for them; a wheel carries them inside the package.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT_FOLDERS = {"recipes": "launchers/recipes", "ds_configs": "ds_configs", "clusters": "launchers/clusters"}


def shipped_files(folder: str, suffix: str) -> dict[str, Path]:
    """Return name without suffix -> path of every file in `recipes`, `ds_configs` or `clusters`, sorted by name."""
    packaged = _PACKAGE / folder
    # Only a wheel has the folder inside the package, so its presence decides; site-packages is never searched.
    root = packaged if packaged.is_dir() else _PACKAGE.parent / _CHECKOUT_FOLDERS[folder]
    return {path.stem: path for path in sorted(root.glob(f"*{suffix}"))}
