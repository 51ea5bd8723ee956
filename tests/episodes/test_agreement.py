"""Student and teacher, side by side at the same observations."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO

from rpd_sb3.envs import make_env
from rpd_sb3.episodes.agreement import Pairs, compare, measure_agreement
from rpd_sb3.episodes.film import Film, Stage
from rpd_sb3.episodes.play import Evaluator, student_actor, teacher_actor
from rpd_sb3.teachers import LocalTeacher
from rpd_sb3.train.cost import student_bytes, student_latency, student_parameters
from rpd_sb3.train.run import record_video
from tests.episodes.test_play import go_to_goal
from tests.support.helpers import EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv

ACTIONS = TinyEnv().action_space


def position_teacher() -> EchoTeacher:
    """Acts with the position, which is often outside of what the environment takes."""
    return EchoTeacher(lambda query: query.inputs["state"][:, :1], space=ACTIONS)


def evaluator(teacher: LocalTeacher | None, n_episodes: int = 3, n_envs: int = 2, **env_kwargs: Any) -> Evaluator:
    return Evaluator(TINY, env_kwargs, n_episodes=n_episodes, n_envs=n_envs, vec_env="dummy", teacher=teacher)


def student(**env_kwargs: Any) -> PPO:
    return PPO("MlpPolicy", make_env(TINY, **env_kwargs), seed=0, device="cpu", policy_kwargs={"net_arch": [8]})


def test_statistics_of_known_actions() -> None:
    teacher = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], np.float32)
    result = compare(teacher + [[0.5, -0.25]], teacher, np.full((3, 2), 0.1, np.float32))
    assert result["n_observations"] == 3
    assert result["mean_abs_difference"] == [0.5, 0.25]
    assert result["bias"] == [0.5, -0.25]
    assert result["teacher_std"] == result["student_std"] == [pytest.approx(np.sqrt(2 / 3)), 0.0]
    assert result["correlation"] == [pytest.approx(1.0), None]
    assert result["teacher_label_std"] == pytest.approx([0.1, 0.1])


def test_bias_has_a_sign_and_differences_have_none() -> None:
    result = compare(np.array([[1.0], [-1.0]]), np.array([[0.0], [0.0]]))
    assert (result["bias"], result["mean_abs_difference"], result["correlation"]) == ([0.0], [1.0], [None])
    assert result["teacher_label_std"] is None


def test_only_observations_of_the_first_episodes_count() -> None:
    """An environment that waits for the other is left out, and so is the sixth episode, which nobody asked for."""
    teacher = position_teacher()
    with closing(evaluator(teacher, n_episodes=5, stop=True)) as evaluate:
        expected = evaluate.evaluate(go_to_goal)
        pairs = Pairs(evaluate.venv, go_to_goal, 5)
        evaluate.evaluate(pairs)
    ours, theirs, std = pairs.arrays()
    assert len(set(expected.lengths)) > 1
    assert len(ours) == len(theirs) == expected.lengths.sum()
    assert std is None
    starts = [make_env(TINY).reset(seed=10_000 + i)[0][0] for i in range(5)]
    assert np.isin(np.array(starts, np.float32), theirs).all()


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_agreement_does_not_depend_on_the_number_of_environments(n_envs: int) -> None:
    model, results = student(), []
    for n in (n_envs, 3):
        with closing(evaluator(position_teacher(), n_envs=n)) as evaluate:
            results.append(measure_agreement(evaluate, model))
    assert results[0] is not None
    assert results[0]["n_observations"] == 30
    for key in ("mean_abs_difference", "bias", "teacher_std", "correlation"):
        assert results[0][key] == pytest.approx(results[1][key])


def test_a_teacher_is_compared_as_it_would_act() -> None:
    loud = EchoTeacher(lambda query: np.full((len(query.env_ids), 1), 7.0, np.float32), space=ACTIONS)
    model = student()
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.fill_(5.0)
    with closing(evaluator(loud)) as evaluate:
        result = measure_agreement(evaluate, model)
    assert result is not None
    assert result["mean_abs_difference"] == [0.0]


def test_tokens_are_compared_as_the_actions_that_they_stand_for() -> None:
    model = student(tokens=5)  # edges -1, -0.5, 0, 0.5, 1
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(th.arange(5.0))  # the last token: 0.75
    teacher = EchoTeacher(lambda query: np.full((len(query.env_ids), 1), 0.5, np.float32), space=ACTIONS)
    with closing(evaluator(teacher, tokens=5)) as evaluate:
        result = measure_agreement(evaluate, model)
    assert result is not None
    assert result["bias"] == [0.25]


def test_a_teacher_of_tokens_is_compared_as_well() -> None:
    space = spaces.MultiDiscrete([5])
    teacher = EchoTeacher(lambda query: np.zeros((len(query.env_ids), 1), np.int64), space=space)
    model = student(tokens=5)
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(th.arange(5.0))
    with closing(evaluator(teacher, tokens=5)) as evaluate:
        result = measure_agreement(evaluate, model)
    assert result is not None
    assert result["bias"] == [1.5]


def test_actions_without_a_size_have_no_agreement() -> None:
    teacher = EchoTeacher(lambda query: np.zeros(len(query.env_ids), np.int64), space=spaces.Discrete(2))
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with closing(Evaluator("CartPole-v1", n_episodes=1, vec_env="dummy", teacher=teacher)) as evaluate:
        assert measure_agreement(evaluate, model) is None


def test_a_teacher_that_was_hidden_is_shown_the_episodes_again() -> None:
    teacher = position_teacher()
    with closing(evaluator(teacher)) as evaluate:
        evaluate.hide_teacher()
        assert evaluate.student(student()).n_episodes == 3
        assert teacher.queries == []
        assert measure_agreement(evaluate, student()) is not None
    assert len(teacher.queries) == 20


def test_latency_and_sizes_of_a_student() -> None:
    model, threads = student(), th.get_num_threads()
    th.set_num_threads(2)
    try:
        latency = student_latency(model, n_calls=5)
        assert th.get_num_threads() == 2
    finally:
        th.set_num_threads(threads)
    assert 0 < latency["median"] <= latency["p95"]
    assert (latency["device"], latency["n_calls"]) == ("cpu", 5)
    # Actor and critic: 2 x 8 + 8 and 8 + 1 each, and a log_std.
    assert student_parameters(model) == 2 * (2 * 8 + 8 + 8 + 1) + 1
    assert student_bytes(model) == 4 * student_parameters(model)


# Filming --------------------------------------------------------------------------------------------------------------


def frames(path: Path) -> np.ndarray:
    import imageio.v2 as imageio

    return np.stack(list(imageio.get_reader(path).iter_data()))


def test_a_film_shows_the_start_and_every_step(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with Film(path) as film, Stage(TINY, {"length": 4}, film, lambda _: student_actor(student())) as stage:
        episode = stage.play(3)
        stage.play(4)
    assert episode.length == 4
    seen = frames(path)
    assert len(seen) == 2 * (1 + 4)
    env = make_env(TINY, render_mode="rgb_array")
    for seed, first in ((3, 0), (4, 5)):
        env.reset(seed=seed)
        bright = np.asarray(env.render())[8, :, 0] > 128
        assert np.array_equal(seen[first][8, :, 0] > 128, bright)


def test_a_gif_is_a_gif(tmp_path: Path) -> None:
    with (
        Film(tmp_path / "film.gif") as film,
        Stage(TINY, {"length": 4}, film, lambda _: student_actor(student())) as stage,
    ):
        stage.play(3)
    content = (tmp_path / "film.gif").read_bytes()
    assert content.startswith(b"GIF89a")
    assert b"NETSCAPE2.0" in content  # plays again and again


def test_videos_play_in_browsers(tmp_path: Path) -> None:
    assert record_video(tmp_path / "video.mp4", TINY, {}, student()) is None
    import imageio.v2 as imageio

    about = imageio.get_reader(tmp_path / "video.mp4").get_meta_data()
    assert (about["codec"], about["pix_fmt"].split("(")[0]) == ("h264", "yuv420p")


def test_a_teacher_is_filmed_as_it_plays(tmp_path: Path) -> None:
    to_goal = EchoTeacher(
        lambda query: (query.inputs["state"][:, 1:] - query.inputs["state"][:, :1]) / 0.3, space=ACTIONS
    )
    with Film(tmp_path / "teacher.mp4") as film, Stage(TINY, {}, film, teacher_actor, to_goal) as stage:
        assert stage.play(0).once
    assert len(to_goal.queries) == 10
    assert to_goal.queries[0].episode_starts.all()
    assert not any(query.episode_starts.any() for query in to_goal.queries[1:])


def test_filming_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def answer(query: Any) -> Any:
        raise RuntimeError("out of\nmemory")

    problem = record_video(tmp_path / "teacher.mp4", TINY, {}, EchoTeacher(answer, space=ACTIONS))
    assert problem is not None
    assert "out of" in problem
    assert "\n" not in problem
    assert list(tmp_path.iterdir()) == []


def test_an_environment_without_pictures_is_not_filmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyEnv, "render", lambda self: np.zeros((3, 3)))
    problem = record_video(tmp_path / "video.mp4", TINY, {}, student())
    assert problem == "the environment renders something of shape (3, 3)"
