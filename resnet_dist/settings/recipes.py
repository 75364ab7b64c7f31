"""Finding recipes by name.

Recipes are the YAML files of `configs/`, in the repository or in the installed package.
"""

from pathlib import Path

from resnet_dist.text import did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel has the recipes inside of the package, and a checkout beside it.
_FOLDERS = (
    _PACKAGE / "configs",
    _PACKAGE.parent / "configs",
)


def recipe_folder() -> Path:
    """The folder of the recipes.

    Raises:
        ValueError: if this installation has no recipes.
    """
    for folder in _FOLDERS:
        quickstart = folder / "quickstart.yaml"
        if quickstart.is_file():
            return folder
    raise ValueError(f"this installation has no recipes: neither {_FOLDERS[0]} nor {_FOLDERS[1]}")


def recipe_names() -> list[str]:
    """The names of all recipes, in alphabetical order."""
    files = recipe_folder().glob("*.yaml")
    return sorted(path.stem for path in files)


def find_recipe(name: str) -> Path:
    """Find the YAML file of a recipe.

    A file with exactly this name takes precedence over a recipe. So `resnet50` is the recipe, and
    `resnet50.yaml` is a file of the current folder if there is one, otherwise the recipe.

    Args:
        name: the path of a YAML file, or the name of a recipe, such as "resnet50". `~` stands for
            the home folder.

    Returns:
        The path of the file.

    Raises:
        ValueError: if there is neither a file nor a recipe. The message has similar names.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    has_no_folder = path.parent == Path()
    is_plain_name = has_no_folder and path.suffix in ("", ".yaml")
    if is_plain_name or path.parent == Path("configs"):
        stem = path.name.removesuffix(".yaml")
        recipe = recipe_folder() / f"{stem}.yaml"
        if recipe.is_file():
            return recipe
    if path.is_dir():
        raise ValueError(f"--config {name} is a folder: name a YAML file or a recipe")
    place = _place(path)
    similar = _similar(path)
    raise ValueError(f"--config {name} does not exist here{place}{similar}")


def _place(path: Path) -> str:
    """The absolute path in parentheses, or "" if `path` is absolute itself."""
    if path.is_absolute():
        return ""
    return f" ({path.absolute()})"


def _similar(path: Path) -> str:
    """A question with a recipe or a file in the same folder whose name is similar, or ""."""
    known = recipe_names()
    if path.parent.is_dir():
        for file in path.parent.glob("*.y*ml"):
            known.append(file.name)
    return did_you_mean(path.name, known) or did_you_mean(path.stem, known)
