"""Export a student to act without this library: ``python -m rpd_sb3.export --run logs/rpd_ppo/PickCube-v1_1``."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpd_sb3.cli.common import RUN_ERROR, Interrupt, Parser, parse_and_run, print_error

NEEDS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}
"""Packages that a format needs besides those of training."""


def make_parser() -> Parser:
    """Every flag."""
    parser = Parser(prog="python -m rpd_sb3.export", description=__doc__)
    add = parser.add_argument
    add("--run", metavar="RUN_DIR", help="the run whose student to export")
    add("--model", choices=("best", "last"), default="best", help="which of the run's models [best]")
    add("--format", choices=tuple(NEEDS), default="onnx", help="what to write [onnx]")
    add("-o", "--output", metavar="DIR", help="folder to write [RUN_DIR/export_FORMAT]")
    add("--overwrite", action="store_true", help="replace an existing export")
    add(
        "--observations",
        metavar="FILE",
        help="compare on the observations of an .npz file instead of playing in the environment",
    )
    add("--push-to-hub", metavar="USER/NAME", help="upload to Hugging Face, with HF_TOKEN")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and return the exit code: 2 for a mistake of the user's, 1 if the export failed, 130 after Ctrl-C."""
    return parse_and_run(argv, make_parser, check, ExportCommand)


def check(args: Any) -> None:
    """Check the command line, as far as it can be checked by itself.

    :raises ValueError: with what is wrong
    """
    if args.run is None:
        raise ValueError(
            "--run is missing: name the run whose student to export, e.g. --run logs/rpd_ppo/PickCube-v1_1"
        )
    missing = [name for name in NEEDS[args.format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"--format {args.format} needs {', '.join(missing)}: pip install 'rpd_sb3[export]'")


class ExportCommand:
    """An export, checked and ready to run.

    :param args: of :func:`check`
    :raises ValueError: for a user's mistake
    """

    def __init__(self, args: Any) -> None:
        from rpd_sb3.contract.secrets import redact
        from rpd_sb3.export.deploy import check_exportable
        from rpd_sb3.export.hub import check_upload
        from rpd_sb3.export.manifest import run_facts, token_spec
        from rpd_sb3.export.observations import with_image_size
        from rpd_sb3.export.writer import Export, check_folder
        from rpd_sb3.students.device import set_threads
        from rpd_sb3.train import folder as runs

        self.args = args
        self.token = None if args.push_to_hub is None else check_upload(args.push_to_hub)
        run = runs.load_run(args.run)
        self.folder = Path(args.output) if args.output else run.folder / f"export_{args.format}"
        check_folder(self.folder, args.overwrite)
        path = run.model_file(args.model)
        model = runs.load_model(run.algo, path, device="cpu")
        policy = check_exportable(model, str(path))
        set_threads(1, "cpu", policy.observation_space)
        self.env_id = run.args["env"]
        self.env_kwargs = with_image_size(self.env_id, run.env_kwargs, policy.observation_space)
        tokens = token_spec(self.env_kwargs, policy.action_space)
        command = shlex.join(redact(["python", "-m", "rpd_sb3.export", *args.argv]))
        self.export = Export(run, model, policy, run_facts(run, path, args.model), args.format, tokens, command)
        self.observations = self._read_or_probe(str(path))

    def _read_or_probe(self, name: str) -> Any:
        """The observations of ``--observations``; without, None, and the environment is checked to show what the policy observes."""
        from rpd_sb3.envs.factory import check_env_id
        from rpd_sb3.export.deploy import input_specs
        from rpd_sb3.export.observations import read
        from rpd_sb3.labelling.probe import check_observations, probe

        if self.args.observations:
            return read(self.args.observations, input_specs(self.export.policy.observation_space))
        check_env_id(self.env_id)
        shown = probe(self.env_id, self.env_kwargs, None)
        try:
            check_observations(self.export.model, shown, name, self.env_id)
        except ValueError as error:
            raise ValueError(f"{error}; give observations with --observations FILE.npz") from error
        return None

    def run(self, interrupt: Interrupt) -> int:
        """Record observations, write the export, compare, and upload if asked to."""
        from rpd_sb3.export.hub import UploadError, upload
        from rpd_sb3.export.observations import facts_of_config, record_observations
        from rpd_sb3.export.writer import ExportError, write_export

        observations = self.observations
        environment = facts_of_config(self.env_id, self.env_kwargs)
        if observations is None:
            observations, environment = record_observations(self.env_id, self.env_kwargs, self.export.model)
        try:
            manifest = write_export(self.folder, self.export, observations, environment)
            self._show(manifest)
            if self.token is not None:
                print(upload(self.folder, self.args.push_to_hub, self.token))
        except (ExportError, UploadError, OSError) as error:
            print_error(error)
            return RUN_ERROR
        print(self.folder, flush=True)
        return 0

    def _show(self, manifest: dict[str, Any]) -> None:
        from rpd_sb3.export.formats import FILES
        from rpd_sb3.export.runtime import manifest_text

        parity = manifest["parity"]
        latency = manifest["latency_ms"]
        file = self.folder / FILES[self.args.format]
        print(manifest_text(manifest))
        print(f"parity   {parity['max_abs_error']:.1e} at most, on {parity['n_observations']} observations")
        print(
            f"size     {manifest['parameters']['policy']:,} parameters, {file.name} {file.stat().st_size / 1e6:.2f} MB"
        )
        print(f"latency  median {latency['median']:.3f} ms, p95 {latency['p95']:.3f} ms, one observation, one thread")

    def close(self) -> None:
        """Nothing is left open."""


if __name__ == "__main__":
    sys.exit(main())
