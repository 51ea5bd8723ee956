"""Writing a policy as ONNX and as a PyTorch graph, and acting with what was written. No format holds a pickle."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from rpd_sb3.export import runtime
from rpd_sb3.export.deploy import DeployablePolicy

FILES = {"onnx": runtime.MODEL, "torch": "policy.pt2"}
"""Format to the file that holds the policy."""
OPSET = 18
IR_VERSION = 8
"""With these versions of ONNX, onnxruntime 1.15 of 2023 runs a policy (tested), for robots that are not updated."""
OUTPUTS = ("action", "tokens")
"""Outputs of a policy; the second one only where tokens stand for actions."""

_MEMBER = re.compile(
    r"\w+/(models/model\.json|data/sample_inputs/model\.pt|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)|archive_format|archive_version|byteorder|\.\w+(/\w+)?)",
    re.ASCII,
)
"""Members of a ``.pt2`` archive that hold data. ``model.pt`` would be the example inputs, pickled: it must be empty."""
_TENSOR = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_OPERATOR = re.compile(r"torch\.ops\.aten\.(?!from_file)\w+\.\w+", re.ASCII)
_EXPRESSION = re.compile(r"[\w\[\]().,'=<>*+/% -]*", re.ASCII)
EXPRESSION_WORDS = frozenset(
    {*("Add", "Mul", "Integer", "Symbol", "Max", "Min", "Mod", "FloorDiv", "CleanDiv", "PythonMod", "Pow", "Eq", "Ne")}
    | {*("integer", "positive", "nonnegative", "True", "False", "L", "inputs", "size")}
)
"""Names in the expressions for sizes; besides them there are symbols, ``s0``."""


def write_onnx(path: Path, deployable: DeployablePolicy, specs: list[dict[str, Any]]) -> None:
    """The policy as an ONNX graph with its weights inside.

    :param path: file to write
    :param deployable: the policy
    :param specs: of its inputs
    """
    import onnx

    program = _program(deployable, specs)
    with _quiet():
        made = th.onnx.export(
            program,
            (),
            input_names=[spec["name"] for spec in specs],
            output_names=list(OUTPUTS[: len(deployable(*_example(specs)))]),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    graph = made.model_proto
    _tidy(graph)
    graph.ir_version = IR_VERSION
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString())


def write_torch(path: Path, deployable: DeployablePolicy, specs: list[dict[str, Any]]) -> None:
    """The policy as a ``.pt2`` archive of :func:`torch.export.save`, which loads without this library.

    :param path: file to write
    :param deployable: the policy
    :param specs: of its inputs
    :raises RuntimeError: if PyTorch has put a pickle or something unknown into it
    """
    program = _program(deployable, specs)
    program.example_inputs = None  # PyTorch pickles them
    with _quiet():
        th.export.save(program, path)
    try:
        checked_archive(path)
    except ValueError as error:
        raise RuntimeError(f"torch.export.save of PyTorch {th.__version__} wrote what is not data: {error}") from error


def torch_act(module: Callable[..., Any], specs: list[dict[str, Any]]) -> runtime.Act:
    """The policy in a PyTorch module, as a function of named arrays.

    :param module: takes and gives what a :class:`DeployablePolicy` does
    :param specs: of its inputs, in order
    """

    def act(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with th.no_grad():
            results = module(*(th.from_numpy(batch[spec["name"]]) for spec in specs))
        return {name: result.numpy() for name, result in zip(OUTPUTS, results)}

    return act


def load_torch(path: Path) -> Callable[..., Any]:
    """The module in a ``.pt2`` archive.

    :raises ValueError: if it is not one, or could run code
    """
    try:
        with _quiet():
            return th.export.load(checked_archive(path)).module()
    except Exception as error:  # a damaged archive makes PyTorch raise almost anything
        raise ValueError(f"{str(path)!r} is not a policy that PyTorch {th.__version__} can load: {error}") from error


def checked_archive(path: Path) -> io.BytesIO:
    """A copy of a ``.pt2`` archive that can be loaded without running code that it brings.

    PyTorch unpickles what an archive asks it to unpickle, and evaluates the expressions in it. A copy is returned so that
    what was checked is what is loaded, even where two readers of zip files differ.

    :param path: the archive
    :raises ValueError: if a member, an operator or an expression is not one of those that :func:`write_torch` writes
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
        names = archive.namelist()
        for name in names:
            content = archive.read(name)
            if not _MEMBER.fullmatch(name) or names.count(name) > 1 or (name.endswith("/model.pt") and content):
                raise ValueError(f"its member {name} is unknown, there twice, or not empty")
            if name.endswith("_config.json"):
                for fqn, entry in json.loads(content)["config"].items():
                    if entry["use_pickle"] is not False or not _TENSOR.fullmatch(entry["path_name"]):
                        raise ValueError(f"{fqn} is pickled in {entry['path_name']}")
            if name.endswith("/model.json"):
                _check_graph(json.loads(content))
            checked.writestr(name, content)
    copy.seek(0)
    return copy


def _check_graph(part: Any, key: str = "") -> None:
    """Check all that PyTorch evaluates, imports or looks up by name when it loads a graph."""
    if isinstance(part, dict):
        for name, inner in part.items():
            _check_graph(inner, name)
    elif isinstance(part, list):
        for inner in part:
            _check_graph(inner, key)
    elif key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(str(part)):
            raise ValueError(f"its operator {part} is unknown")
    elif key in ("expr_str", "guards_code"):
        words = set(re.findall(r"[A-Za-z_]\w*", str(part))) - EXPRESSION_WORDS
        if not _EXPRESSION.fullmatch(str(part)) or not all(re.fullmatch(r"[su]\d+", word) for word in words):
            raise ValueError(f"its expression {part} is unknown")
    elif key in ("in_spec", "out_spec"):
        types = set(re.findall(r'"type": "(.*?)"', json.dumps(json.loads(part))))
        types -= {"builtins.tuple", "builtins.list", "builtins.dict"}
        if types:
            raise ValueError(f"its inputs or outputs are {', '.join(types)}")


def _program(deployable: DeployablePolicy, specs: list[dict[str, Any]]) -> th.export.ExportedProgram:
    """The policy as a graph for batches of any size."""
    shapes = tuple({0: th.export.Dim("batch", min=1)} for _ in specs)
    with _quiet(), th.no_grad():
        program = th.export.export(deployable, _example(specs), dynamic_shapes={"inputs": shapes})
    for node in program.graph.nodes:  # stack traces hold paths of this machine
        node.meta.pop("stack_trace", None)
    return program


def _example(specs: list[dict[str, Any]]) -> tuple[th.Tensor, ...]:
    """A batch of two zeros: PyTorch would make a constant of a batch size of one."""
    return tuple(th.zeros(2, *spec["shape"], dtype=getattr(th, spec["dtype"])) for spec in specs)


def _tidy(graph: Any) -> None:
    """Remove from a graph what it does not need to run: stack traces, names of Python classes."""
    inner = graph.graph
    for part in (graph, inner, *inner.node, *inner.input, *inner.output, *inner.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    inner.ClearField("value_info")
    for value in (*inner.input, *inner.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of PyTorch's exporter about its own deprecations and about torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
