"""Act with an exported policy: numpy and onnxruntime are all that is needed.

``policy = load(folder)``, then ``action = policy(observation)``; ``python runtime.py`` checks the export that lies next to it.
Every export carries a copy of this file: it imports nothing of the library that wrote the export.

Shape letters: n observations of a batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT_VERSION = 1
MANIFEST = "policy.json"
MODEL = "policy.onnx"
CHECK = "check.npz"
CONTENT: dict[str, Any] = {
    "format": str,
    "name": str,
    "observation": [{"name": str, "shape": list, "dtype": str, "layout": str}],
    "action": {"shape": list, "dtype": str},
    "environment": {"id": str, "env_kwargs": dict},
    "training": {"algorithm": str},
    "success": dict,
    "parity": {"tolerance": float},
    "files": dict,
}
"""What every manifest has, by type; the manifests have more."""
Act = Callable[[Any], Any]
"""From a mapping with a batch of each input to one with ``action``, and ``tokens`` if the policy has them."""


class Latency(NamedTuple):
    """Time of one call with one observation."""

    median_ms: float
    p95_ms: float


def load(folder: str | Path, threads: int = 1) -> Policy:
    """The policy of an export of format ``onnx``.

    :param folder: of the export
    :param threads: of onnxruntime; small policies are quickest with one
    :raises ValueError: if the folder is not such an export, a file is damaged, or manifest and policy do not fit
    """
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads={threads!r} must be a whole number, at least 1")
    manifest = read_manifest(folder)
    if manifest["format"] != "onnx":
        raise ValueError(f"export {str(folder)!r} has format {manifest['format']!r}, the runtime needs 'onnx'")
    return Policy(folder, manifest, _session(folder, manifest, threads))


class Policy:
    """An exported policy: gives the action for one observation, or for a batch.

    :param folder: of the export
    :param manifest: of :func:`read_manifest`
    :param act: computes a batch
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], act: Act) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self._act = act
        self._inputs = {spec["name"]: spec for spec in manifest["observation"]}

    def __call__(self, observation: Any) -> np.ndarray:
        """The action to take, in the units of the environment.

        :param observation: array, or mapping with one array for each input; uint8 images are ``(H, W, C)``. Each with one
            dimension more, ``(n, ...)``, is a batch
        :return: action, or a batch ``(n, ...)`` of them; a new array
        :raises ValueError: if the observation has another shape or dtype than those trained with, or holds NaN
        """
        batch, single = self._batch(observation)
        action = self._act(batch)["action"]
        return np.array(action[0] if single else action)

    predict = __call__

    def answer(self, observation: Any) -> dict[str, np.ndarray]:
        """A batch of ``action``, and of the ``tokens`` that stand for it if the policy has such.

        :param observation: as in :meth:`__call__`
        """
        return self._act(self._batch(observation)[0])

    def compare(self, observations: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, bool]:
        """Compare with known answers, in one batch and one by one.

        :param observations: input name to ``(n, ...)``
        :param expected: ``action`` ``(n, ...)``, and ``tokens`` if the policy has them
        :return: largest difference between two actions, NaN if one is not finite; whether all tokens are the same
        """
        n = len(expected["action"])
        difference = 0.0
        same = True
        for rows in (slice(0, n), *(slice(i, i + 1) for i in range(n))):
            got = self.answer({name: array[rows] for name, array in observations.items()})
            difference = float(np.maximum(difference, np.abs(got["action"] - expected["action"][rows]).max()))
            same = same and ("tokens" not in got or np.array_equal(got["tokens"], expected["tokens"][rows]))
        return difference, same

    def check(self) -> float:
        """Compare with the recorded actions in the export.

        :return: largest difference between an action and the recorded one
        :raises ValueError: if it exceeds the manifest's tolerance, or a token differs
        """
        expected = read_arrays(checked_file(self.folder, self.manifest, CHECK))
        difference, same = self.compare({name: expected["obs/" + name] for name in self._inputs}, expected)
        if not (same and difference <= self.manifest["parity"]["tolerance"]):
            raise ValueError(
                f"export {str(self.folder)!r} does not act here as it was recorded: actions differ by up to {difference:.3g}"
                f"{'' if same else ', and tokens differ'}; another version of onnxruntime may help"
            )
        return difference

    def latency(self, n: int = 200) -> Latency:
        """Time of a call with one observation, everything included.

        :param n: calls to measure, after a tenth as many to warm up
        """
        recorded = read_arrays(checked_file(self.folder, self.manifest, CHECK))
        times = []
        observation = {name: recorded["obs/" + name][0] for name in self._inputs}
        for _ in range(n + n // 10):
            start = time.perf_counter()
            self(observation)
            times.append(1000 * (time.perf_counter() - start))
        return Latency(*(float(value) for value in np.percentile(times[n // 10 :], [50, 95])))

    def _batch(self, observation: Any) -> tuple[dict[str, np.ndarray], bool]:
        """A batch of each input, and whether it was a single observation."""
        names = list(self._inputs)
        if not isinstance(observation, dict):
            if len(names) > 1:
                kind = type(observation).__name__
                raise ValueError(f"the observation is a {kind}, expected a mapping with {', '.join(names)}")
            observation = {names[0]: observation}
        if set(observation) != set(names):
            given = ", ".join(map(str, observation)) or "nothing"
            raise ValueError(f"the observation has {given}, expected {', '.join(names)}")
        batch = {name: _checked(observation[name], spec) for name, spec in self._inputs.items()}
        sizes = {value.shape[: value.ndim - len(self._inputs[name]["shape"])] for name, value in batch.items()}
        if len(sizes) > 1:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in batch.items())
            raise ValueError(f"the inputs are not of one batch: {shapes}")
        single = sizes == {()}
        return ({name: value[None] for name, value in batch.items()} if single else batch), single


def _checked(value: Any, spec: dict[str, Any]) -> np.ndarray:
    """One input of one observation or of a batch, as the policy takes it."""
    name = spec["name"]
    shape = tuple(spec["shape"])
    dtype = spec["dtype"]
    array = np.asarray(value)
    if array.dtype != dtype and not (dtype == "float32" and array.dtype.kind == "f"):
        hint = "; the policy scales images itself" if dtype == "uint8" else ""
        raise ValueError(f"observation {name!r} has dtype {array.dtype}, expected {dtype}{hint}")
    if array.shape != shape and (array.shape[1:] != shape or array.ndim != len(shape) + 1 or not len(array)):
        hint = " (channels last)" if spec["layout"] == "HWC" else ""
        raise ValueError(f"observation {name!r} has shape {array.shape}, expected {shape}{hint} or a batch (n, ...)")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"observation {name!r} holds NaN or infinity")
    return np.ascontiguousarray(array, dtype=dtype)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The content of ``policy.json``, with its keys and types checked.

    :param folder: of the export
    :raises ValueError: if there is no such file, or it is not a manifest
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        what = f"has no {MANIFEST}" if Path(folder).is_dir() else "does not exist"
        raise ValueError(f"export {str(folder)!r} {what}; expected a folder made by python -m rpd_sb3.export")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}; export the run again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format_version {version!r}, expected {FORMAT_VERSION}; export the run again"
        )
    _check_content(manifest, CONTENT, str(path))
    return manifest


def _check_content(value: Any, wanted: Any, path: str, key: str = "") -> None:
    """Check that a part of the manifest is of the type wanted, which may be a mapping or a list of one type."""
    kind: Any = wanted if isinstance(wanted, type) else type(wanted)
    if not isinstance(value, kind) or (isinstance(wanted, list) and not value):
        raise ValueError(f"{path!r}: {key} is {value!r}, expected a {kind.__name__}; export the run again")
    if isinstance(wanted, list):
        for item in value:
            _check_content(item, wanted[0], path, key)
    elif isinstance(wanted, dict):
        for name, inner in wanted.items():
            full = key + "." * bool(key) + name
            if name not in value:
                raise ValueError(f"{path!r} has no {full}; export the run again")
            _check_content(value[name], inner, path, full)


def checked_file(folder: str | Path, manifest: dict[str, Any], name: str) -> Path:
    """The path of a file of the export.

    :param folder: of the export
    :param manifest: of :func:`read_manifest`
    :param name: of the file
    :raises ValueError: if it is missing, or is not the one that the manifest was written for
    """
    path = Path(folder) / name
    if not path.is_file():
        raise ValueError(f"export {str(folder)!r} has no {name}; export the run again")
    facts = manifest["files"].get(name)
    if not isinstance(facts, dict) or hashlib.sha256(path.read_bytes()).hexdigest() != facts.get("sha256"):
        raise ValueError(f"{str(path)!r} is damaged or of another export: its sha256 is not the one in {MANIFEST}")
    return path


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file without pickles."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _session(folder: str | Path, manifest: dict[str, Any], threads: int) -> Act:
    """The graph in ``policy.onnx``, ready to run."""
    path = checked_file(folder, manifest, MODEL)
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"onnxruntime is missing, which runs {MODEL}: pip install onnxruntime ({error})") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{str(path)!r} is not a policy that onnxruntime can run: {reason}") from error
    _check_graph(session, manifest, str(path))
    outputs = [output.name for output in session.get_outputs()]
    return lambda batch: dict(zip(outputs, session.run(outputs, batch)))


def _check_graph(session: Any, manifest: dict[str, Any], path: str) -> None:
    """Check that the graph takes and gives what the manifest says."""
    types = {"uint8": "tensor(uint8)", "float32": "tensor(float)", "int64": "tensor(int64)"}
    action = dict(manifest["action"], name="action")
    for given, specs in ((session.get_inputs(), manifest["observation"]), (session.get_outputs()[:1], [action])):
        found = [(node.name, list(node.shape[1:]), node.type) for node in given]
        wanted = [(spec["name"], list(spec["shape"]), types.get(spec["dtype"])) for spec in specs]
        if sorted(found, key=str) != sorted(wanted, key=str):
            raise ValueError(f"{path!r} has {found}, but {MANIFEST} says {wanted}; export the run again")


def cpu_name() -> str:
    """The name of the processor."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def manifest_text(manifest: dict[str, Any]) -> str:
    """Name, inputs, outputs and success of an export, one line each."""
    lines = [f"{manifest['name']}: {manifest['training']['algorithm']} on {manifest['environment']['id']}"]
    for spec in manifest["observation"]:
        lines.append(f"in       {spec['name']} {spec['dtype']} {tuple(spec['shape'])} {spec['layout']}")
    action = manifest["action"]
    names = " ".join(action.get("names") or ())
    lines.append(f"out      action {action['dtype']} {tuple(action['shape'])} {names}".rstrip())
    for who, result in manifest["success"].items():
        if result and rate_text(result):
            lines.append(f"success  {who} {rate_text(result)} of {result['n_episodes']} episodes")
    return "\n".join(lines)


def rate_text(result: dict[str, Any]) -> str:
    """``50% [25%, 75%]``; empty where success is not known."""
    rate = result.get("success_once")
    return "" if rate is None else "{:.0%} [{:.0%}, {:.0%}]".format(rate, *result["ci95"])


def main(argv: Any = None) -> int:
    """Check an export and describe it; the exit code is 2 if it cannot be loaded, 1 if it acts differently here."""
    parser = argparse.ArgumentParser(description="Check an exported policy on this machine, and time it.")
    here = Path(__file__).resolve().parent
    own = str(here) if (here / MANIFEST).is_file() else None
    parser.add_argument("folder", nargs="?" if own else None, default=own, help=f"of the export [{own or 'none'}]")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime [1]")
    args = parser.parse_args(argv)
    code = 2
    try:
        policy = load(args.folder, args.threads)
        code = 1
        print(manifest_text(policy.manifest))
        print(f"check    ok, actions differ by at most {policy.check():.2g}")
        times = "median {:.3f} ms, p95 {:.3f} ms".format(*policy.latency())
        print(f"latency  {times}, one observation, {args.threads} thread{'s' * (args.threads > 1)}, {cpu_name()}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
