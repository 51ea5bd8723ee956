"""Success of the scripted teachers on seeded episodes that they were not tuned on.

python benchmarks/teachers.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "teachers.json"
EPISODES = ["--n-episodes", "100", "--seed", "20000"]
TASKS = ("LiftPegUpright", "PickCube", "PokeCube", "PullCube", "PullCubeTool", "PushCube", "RollBall", "StackCube")


def main() -> None:
    records = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        for task in TASKS:
            command = ["-m", "rpd_sb3.evaluate", "--teacher", "scripted", "--env", f"{task}-v1", *EPISODES]
            subprocess.run([sys.executable, *command, "--json", str(file)], check=True, stdout=subprocess.DEVNULL)
            records.append(
                {"env": f"{task}-v1", "command": " ".join(["python", *command])} | json.loads(file.read_text())
            )
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    print("| task | success | 95 % interval | at the last step |\n|---|---|---|---|")
    for record in records:
        low, high = record["ci95"]
        print(
            f"| {record['env']} | {record['success_once']:.0%} | {low:.0%} to {high:.0%} | {record['success_at_end']:.0%} |"
        )


if __name__ == "__main__":
    main()
