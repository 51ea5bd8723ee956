"""The ``octo`` library: whether it is the robot model, and what to do if it does not import.

The package index has an unrelated plugin framework of the same name, so nothing of a package is executed before its
files say what it is.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any, NamedTuple

COMMIT = "241fb3514b7c40957a86d869fecb7c7fc353f540"
"""Of the repository octo-models/octo; what this teacher is written for."""
INSTALL = "install what requirements/octo.txt lists, in the order that it says"
FOREIGN = ("manager.py", "plugin.py")
"""Files of the plugin framework that are none of the robot model's."""


class Clash(NamedTuple):
    """A version that is known not to work, by what its error says."""

    says: str
    pin: str


CLASHES = (
    Clash("scipy.linalg", "scipy==1.11.4 (JAX 0.4.20 does not work with 1.15)"),
    Clash("jaxlib version", "jaxlib==0.4.20, the same version as jax"),
    Clash("FlaxAutoModel", "transformers==4.36.2 (5 has no Flax)"),
    Clash("FlaxT5EncoderModel", "transformers==4.36.2 (5 has no Flax)"),
    Clash("KeyArray", "jax==0.4.20 and jaxlib==0.4.20"),
    Clash("define_bool_state", "jax==0.4.20 and jaxlib==0.4.20 (flax 0.7.5 does not know 0.4.25)"),
)


def check_package() -> None:
    """Look at the files of the installed ``octo``, and execute nothing.

    :raises ValueError: if it is missing, another package of that name, or both in one folder
    """
    try:
        spec = importlib.util.find_spec("octo")
    except ValueError:  # imported already, by something that hides where it comes from
        spec = None
    if spec is None:
        raise ValueError(f"the package octo is missing: {INSTALL}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    ours = [folder for folder in folders if (folder / "model" / "octo_model.py").is_file()]
    if not ours:
        where = folders[0] if folders else spec.origin
        raise ValueError(
            f"the package octo in {where} is not the robot model but something else of that name, like the package "
            f"index's plugin framework: pip uninstall octo, then {INSTALL}"
        )
    if any((folder / name).is_file() for folder in folders for name in FOREIGN):
        raise ValueError(
            f"the package octo in {ours[0]} is mixed with the package index's plugin framework of that name: "
            f"pip uninstall octo, delete the folder, then {INSTALL}"
        )


def import_model_class() -> Any:
    """The class ``OctoModel``, of a version that this teacher knows.

    :raises ValueError: if the package is not the robot model, does not import, or is too old
    """
    check_package()
    try:
        cls = importlib.import_module("octo.model.octo_model").OctoModel
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(explained(error)) from error
    if "timestep_pad_mask" not in inspect.signature(cls.sample_actions).parameters:
        raise ValueError(
            f"the package octo is version 0.1 or older: sample_actions has no timestep_pad_mask; install commit {COMMIT}"
        )
    return cls


def explained(error: BaseException) -> str:
    """One sentence on why octo, or what it builds on, does not import.

    :param error: what was raised; its causes are looked at as well
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for one in causes:
        clash = next((clash for clash in CLASHES if clash.says in str(one)), None)
        if clash is not None:
            return f"octo does not work with a version that is installed ({first_line(one)}): install {clash.pin}"
    missing = next((one.name for one in causes if isinstance(one, ModuleNotFoundError) and one.name), None)
    if missing is not None:
        return f"octo needs the module {missing}, which is missing: {INSTALL}"
    return f"octo does not work with a version that is installed ({first_line(error)}): {INSTALL}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0].rstrip(". ")
