"""Recipes by name: the YAML files of `configs/`, in the repository or in the installed package."""

from pathlib import Path

from resnet_dist.text import did_you_mean

_PACKAGE = Path(__file__).resolve().parent
# An installed wheel has the recipes inside the package, a checkout beside it.
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def recipe_folder() -> Path:
    """The folder of the recipes. Raises ValueError if this installation has none."""
    for folder in _FOLDERS:
        if (folder / "quickstart.yaml").is_file():
            return folder
    raise ValueError(f"this installation has no recipes: neither {_FOLDERS[0]} nor {_FOLDERS[1]}")


def recipe_names() -> list[str]:
    """The names of all recipes, in alphabetical order."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The YAML file that `name` means: a path, or the name of a recipe (resnet50).

    `~` stands for the home folder. A file of the current folder comes before a recipe of the same
    name, but its name must be complete: `resnet50` is the recipe, `resnet50.yaml` may be a file.
    Raises ValueError, with similar names, if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    is_plain_name = path.parent == Path() and path.suffix in ("", ".yaml")
    if is_plain_name or path.parent == Path("configs"):
        recipe = recipe_folder() / f"{path.name.removesuffix('.yaml')}.yaml"
        if recipe.is_file():
            return recipe
    if path.is_dir():
        raise ValueError(f"--config {name} is a folder: name a YAML file or a recipe")
    raise ValueError(f"--config {name} does not exist here{_place(path)}{_similar(path)}")


def _place(path: Path) -> str:
    return "" if path.is_absolute() else f" ({path.absolute()})"


def _similar(path: Path) -> str:
    known = recipe_names()
    if path.parent.is_dir():
        known += [one.name for one in path.parent.glob("*.y*ml")]
    return did_you_mean(path.name, known) or did_you_mean(path.stem, known)
