"""Writing a policy as ONNX, as a PyTorch graph and as bare weights, and acting with what was written. No format holds a pickle."""

from __future__ import annotations

import logging
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy

from rpd_sb3.export import runtime
from rpd_sb3.export.deploy import DeployablePolicy

FILES = {"onnx": runtime.MODEL, "torch": "policy.pt2", "safetensors": "model.safetensors"}
"""What the policy of each format lies in."""
OPSET, IR_VERSION = 18, 8
"""Of ONNX: what onnxruntime 1.15, of 2023, can run already (tested), for robots that are not updated."""

OUTPUTS = ("action", "tokens")
"""Of a policy; the second one only where tokens stand for actions."""


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
    :raises RuntimeError: if PyTorch has put a pickle into it
    """
    program = _program(deployable, specs)
    program.example_inputs = None  # PyTorch pickles them
    with _quiet():
        th.export.save(program, path)
    if pickles := pickles_in(path):
        raise RuntimeError(f"torch.export.save of PyTorch {th.__version__} wrote pickles: {', '.join(pickles)}")


def write_safetensors(path: Path, policy: ActorCriticPolicy) -> None:
    """All weights of the policy, value function included.

    :param path: file to write
    :param policy: the policy
    """
    from safetensors.torch import save_model

    save_model(policy, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets nobody else read


def torch_act(module: Callable[..., Any], specs: list[dict[str, Any]]) -> runtime.Act:
    """Acts with a PyTorch module that takes what a :class:`DeployablePolicy` takes.

    :param module: the policy
    :param specs: of its inputs, in order
    """

    def act(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with th.no_grad():
            results = module(*(th.from_numpy(batch[spec["name"]]) for spec in specs))
        return {name: result.numpy() for name, result in zip(OUTPUTS, results)}

    return act


def load_torch(path: Path) -> Callable[..., Any]:
    """The module in a ``.pt2`` archive.

    :raises ValueError: if it is none, or holds a pickle
    """
    try:
        if pickles := pickles_in(path):
            raise ValueError(f"it holds pickles: {', '.join(pickles)}")
        with _quiet():
            return th.export.load(path).module()
    except (ValueError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is no policy that PyTorch {th.__version__} can load: {error}") from error


def load_safetensors(path: Path, policy: ActorCriticPolicy) -> None:
    """Load the weights into a policy of the same architecture.

    :raises ValueError: if they are damaged or of another one
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    try:
        load_model(policy, path)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} does not hold the weights of the policy in {runtime.MANIFEST}: {error}"
        ) from error


def pickles_in(path: Path) -> list[str]:
    """Members of a zip file that are pickles, or archives of their own, in which PyTorch keeps pickles.

    :param path: the file
    """
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    return [name for name, content in contents.items() if content[:2] == b"PK" or _is_pickle(content)]


def _is_pickle(content: bytes) -> bool:
    """True if the bytes are a pickle from the first to the last; nothing is executed."""
    try:
        return bool(content) and [position for *_, position in pickletools.genops(content)][-1] == len(content) - 1
    except Exception:  # whatever is no pickle fails in a way of its own
        return False


def _program(deployable: DeployablePolicy, specs: list[dict[str, Any]]) -> th.export.ExportedProgram:
    """The policy as a graph for batches of any size."""
    shapes = tuple({0: th.export.Dim("batch", min=1)} for _ in specs)
    with _quiet(), th.no_grad():
        program = th.export.export(deployable, _example(specs), dynamic_shapes={"inputs": shapes})
    for node in program.graph.nodes:  # where the code lies on this machine is nobody's business
        node.meta.pop("stack_trace", None)
    return program


def _example(specs: list[dict[str, Any]]) -> tuple[th.Tensor, ...]:
    """A batch of two: PyTorch would take a batch of one for a constant."""
    return tuple(th.zeros(2, *spec["shape"], dtype=getattr(th, spec["dtype"])) for spec in specs)


def _tidy(graph: Any) -> None:
    """Leave in a graph what is needed to run it: no stack traces, no names of Python classes."""
    inner = graph.graph
    for part in (graph, inner, *inner.node, *inner.input, *inner.output, *inner.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    inner.ClearField("value_info")
    for value in (*inner.input, *inner.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter speaks of its own deprecations, and of torchvision, which is not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
