"""Imports the ``octo`` package, or explains why it cannot be imported.

The package index has an unrelated plugin framework of the same name, so the installed files are checked before any of
them is executed.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

COMMIT = "241fb3514b7c40957a86d869fecb7c7fc353f540"
"""Of the repository octo-models/octo, which this teacher is written for."""
INSTALL = "install what requirements/octo.txt lists, in the order that it says"
FOREIGN = ("manager.py", "plugin.py")
"""Files of the plugin framework that the robot model does not have."""


CLASHES = {
    "scipy.linalg": "scipy==1.11.4 (JAX 0.4.20 does not work with 1.15)",
    "jaxlib version": "jaxlib==0.4.20, the same version as jax",
    "FlaxAutoModel": "transformers==4.36.2 (5 has no Flax)",
    "FlaxT5EncoderModel": "transformers==4.36.2 (5 has no Flax)",
    "KeyArray": "jax==0.4.20 and jaxlib==0.4.20",
    "define_bool_state": "jax==0.4.20 and jaxlib==0.4.20 (flax 0.7.5 does not know 0.4.25)",
}
"""Part of an error's message to the version to install instead of one that is known not to work."""


def check_package() -> None:
    """Checks that the installed ``octo`` is the robot model, without executing any of its files.

    :raises ValueError: if it is missing, another package of that name, or a mixture of both
    """
    try:
        spec = importlib.util.find_spec("octo")
    except ValueError:  # it is imported already, and has no __spec__
        spec = None
    if spec is None:
        raise ValueError(f"the package octo is missing: {INSTALL}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    ours = [folder for folder in folders if (folder / "model" / "octo_model.py").is_file()]
    if not ours:
        where = folders[0] if folders else spec.origin
        raise ValueError(
            f"the package octo in {where} is not the robot model but another package of that name, e.g. the package "
            f"index's plugin framework: pip uninstall octo, then {INSTALL}"
        )
    if any((folder / name).is_file() for folder in folders for name in FOREIGN):
        raise ValueError(
            f"the package octo in {ours[0]} is mixed with the package index's plugin framework of that name: "
            f"pip uninstall octo, delete the folder, then {INSTALL}"
        )


def import_model_class() -> Any:
    """The class ``OctoModel``, in a version that this teacher works with.

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
    """One sentence on why octo, or a package that it needs, does not import.

    :param error: that was raised; its causes are considered too
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for one in causes:
        for says, pin in CLASHES.items():
            if says in str(one):
                return f"octo does not work with a version that is installed ({first_line(one)}): install {pin}"
    missing = next((one.name for one in causes if isinstance(one, ModuleNotFoundError) and one.name), None)
    if missing is not None:
        return f"octo needs the module {missing}, which is missing: {INSTALL}"
    return f"octo does not work with a version that is installed ({first_line(error)}): {INSTALL}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[0].rstrip(". ")
