"""Training against a service that is killed and comes back."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import TeacherError
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
from tests.support import ROOT
from tests.support.helpers import CountingEnv
from tests.support.serving_helpers import free_port, is_ready, wait_for


def start_server(port: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.support.echo_server", str(port)], cwd=ROOT)


class KillAndRestart(BaseCallback):
    """Kills the server in the middle of the second rollout, and starts it again at its end, when labels are wanted."""

    def __init__(self, server: subprocess.Popen[bytes] | None, port: int, restart: bool = True) -> None:
        super().__init__()
        self.server, self.port, self.restart = server, port, restart
        self.labels: list[np.ndarray] = []
        self.labelled: list[np.ndarray] = []

    def _on_step(self) -> bool:
        if self.server is not None and self.num_timesteps == 48:
            self.server.kill()
            self.server.wait()
        if self.server is not None and self.restart and self.num_timesteps == 56:
            self.server = start_server(self.port)
        return True

    def keep(self, model: RPD) -> None:
        self.labels.append(model.rollout_buffer.labels["action"].copy())
        self.labelled.append(model.rollout_buffer.labelled.copy())


class Recording(RPD):
    """Hands the labels of each rollout to ``keep`` before they are used."""

    keep: KillAndRestart

    def prepare_rollout(self) -> None:
        super().prepare_rollout()
        self.keep.keep(self)


def train(port: int, callback: KillAndRestart, on_failure: str, timeout: float = 60.0) -> Recording:
    with closing(RemoteTeacher([f"http://127.0.0.1:{port}"])) as teacher:
        envs = DummyVecEnv([lambda i=i: CountingEnv(number=i, length=3 + i) for i in range(2)])
        venv = VecTeacher(envs, teacher, on_failure=on_failure, timeout=timeout, patience=60.0)
        model = Recording("MlpPolicy", venv, n_steps=16, batch_size=16, n_epochs=1, seed=0)
        model.keep = callback
        return model.learn(96, callback)


@pytest.mark.parametrize("on_failure", ["raise", "wait"])
def test_server_that_is_killed_and_restarted_costs_no_label_and_changes_none(on_failure: str) -> None:
    port = free_port()
    server = start_server(port)
    try:
        wait_for(lambda: is_ready(f"http://127.0.0.1:{port}"))
        undisturbed = KillAndRestart(None, port)
        calm = train(port, undisturbed, "raise")
        disturbed = KillAndRestart(server, port)
        model = train(port, disturbed, on_failure)
        assert disturbed.server is not server, "it was killed and started again"
        server = disturbed.server or server
    finally:
        server.kill()
        server.wait()
    assert np.all(disturbed.labelled)
    np.testing.assert_array_equal(disturbed.labels, undisturbed.labels)
    for name, value in calm.policy.state_dict().items():
        assert value.equal(model.policy.state_dict()[name]), f"{name} differs"


def test_server_that_stays_away_ends_training_with_a_sentence() -> None:
    port = free_port()
    server = start_server(port)
    try:
        wait_for(lambda: is_ready(f"http://127.0.0.1:{port}"))
        with pytest.raises(TeacherError, match=f"teacher at http://127.0.0.1:{port}: "):
            train(port, KillAndRestart(server, port, restart=False), "raise", timeout=1.0)
    finally:
        server.kill()
        server.wait()
