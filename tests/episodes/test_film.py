"""Films of a student or a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpd_sb3.envs import make_env
from rpd_sb3.episodes.film import Film, RenderedEnv
from rpd_sb3.episodes.play import student_actor, teacher_actor
from rpd_sb3.train.run import record_video
from tests.support.helpers import EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv
from tests.support.train_helpers import student

ACTIONS = TinyEnv().action_space


def frames(path: Path) -> np.ndarray:
    import imageio.v2 as imageio

    return np.stack(list(imageio.get_reader(path).iter_data()))


def test_a_film_shows_the_start_and_every_step(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with Film(path) as film, RenderedEnv(TINY, {"length": 4}, film, lambda _: student_actor(student())) as rendered:
        episode = rendered.play(3)
        rendered.play(4)
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
        RenderedEnv(TINY, {"length": 4}, film, lambda _: student_actor(student())) as env,
    ):
        env.play(3)
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
    with Film(tmp_path / "teacher.mp4") as film, RenderedEnv(TINY, {}, film, teacher_actor, to_goal) as env:
        assert env.play(0).once
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
    assert problem is not None
    assert "shape (3, 3)" in problem


def test_an_environment_that_cannot_render_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(TinyEnv, "render")
    with (
        Film(tmp_path / "video.mp4") as film,
        RenderedEnv(TINY, {}, film, lambda _: student_actor(student())) as rendered,
        pytest.raises(ValueError, match="TinyEnv.* does not render"),
    ):
        rendered.play(0)
    assert list(tmp_path.iterdir()) == []
