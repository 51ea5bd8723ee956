"""Light visuals: other triangles, and nothing else is different. These tests run the real simulator."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sapien
import torch
import trimesh
from gymnasium import spaces

from rpd_sb3.contract.teacher import TeacherSpec
from rpd_sb3.envs import make_env, visuals
from rpd_sb3.envs.factory import default_visuals, with_visuals
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.envs.visuals import Mesh

PRIVILEGED = TeacherSpec("test", frozenset({"action"}), ("privileged", "state"), spaces.Box(-1, 1, (7,), np.float32))
LOOKER = TeacherSpec("test", frozenset({"action"}), ("images.human",), PRIVILEGED.action_space)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache, and an environment that keeps shaders loaded: without one the next compiles them again (5 s)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        env = make_env("PushCube-v1", obs="rgb", image_size=8)
        yield visuals.cache_folder()
        env.close()


def scene_of(env: gym.Env) -> sapien.Scene:
    return env.unwrapped.scene.sub_scenes[0]  # type: ignore[attr-defined]


def play(env: gym.Env, n_steps: int = 10) -> tuple[list[Any], np.ndarray]:
    """All that is not drawn, and the frames, of a few random steps with a reset in between."""
    rng = np.random.default_rng(0)
    steps: list[Any] = [env.reset(seed=1)]
    steps += [env.step(rng.uniform(-1, 1, 7)) for _ in range(n_steps - 1)]
    steps.append(env.reset())
    frames = np.stack([step[0].pop("rgb") for step in steps])
    return steps, frames


@pytest.mark.parametrize("task", list(TASKS))
def test_only_the_triangles_differ(task: str) -> None:
    played = {}
    for name in visuals.VISUALS:
        env = make_env(
            task,
            obs="rgb+state",
            image_size=64,
            reward="dense",
            teacher=PRIVILEGED,
            visuals=name,
            on_success="continue",
        )
        played[name] = (*play(env), visuals.count_triangles(scene_of(env)))
        env.close()
    (steps, frames, n_triangles), (light_steps, light_frames, n_light) = played["full"], played["light"]
    assert set(steps[0][0]) == {"state", "teacher/privileged", "teacher/state"}
    np.testing.assert_equal(light_steps, steps)
    differs = np.abs(frames.astype(int) - light_frames).max(-1) > 16
    assert 0 < differs.mean() < 0.05
    assert n_triangles > 150_000
    assert n_light <= 15_000


def test_a_rebuilt_scene_is_drawn_the_same() -> None:
    env = make_env("PickCube-v1", obs="rgb", image_size=64, visuals="light")
    before = env.reset(seed=3)[0]
    after = env.reset(seed=3, options={"reconfigure": True})[0]
    np.testing.assert_array_equal(after, before)
    assert visuals.count_triangles(scene_of(env)) <= 15_000
    env.close()


def test_a_body_keeps_everything_but_its_meshes() -> None:
    def bodies(name: str) -> dict[str, Any]:
        env = make_env("PickCube-v1", obs="rgb", image_size=8, visuals=name)
        found = {
            entity.name: entity.find_component_by_type(sapien.render.RenderBodyComponent)
            for entity in scene_of(env).entities
        }
        env.close()
        return {name: body for name, body in found.items() if body is not None}

    def facts(body: Any) -> list[Any]:
        drawn = [body.name, body.visibility, body.shading_mode, body.is_render_id_disabled]
        for shape in body.render_shapes:
            for part in shape.parts:
                pose = (*shape.local_pose.p, *shape.local_pose.q)
                drawn.append((shape.name, pose, shape.front_face, part.material.base_color, part.material.roughness))
        return drawn

    full, light = bodies("full"), bodies("light")
    assert set(full) == set(light)
    for name in full:
        np.testing.assert_equal(facts(light[name]), facts(full[name]), err_msg=name)
    hand = {
        name: sum(len(part.triangles) for shape in b["panda_hand"].render_shapes for part in shape.parts)
        for name, b in (("full", full), ("light", light))
    }
    assert hand["light"] < hand["full"] / 5


def scene_with(shape: Any) -> sapien.Scene:
    scene = sapien.Scene([sapien.render.RenderSystem("cpu")])
    body = sapien.render.RenderBodyComponent()
    body.attach(shape)
    entity = sapien.Entity()
    entity.add_component(body)
    scene.add_entity(entity)
    return scene


def ball() -> Mesh:
    sphere = trimesh.creation.icosphere(4)
    n = len(sphere.vertices)
    return Mesh(
        sphere.vertices.astype(np.float32),
        sphere.faces.astype(np.uint32),
        sphere.vertex_normals.astype(np.float32),
        np.zeros((n, 2), np.float32),
    )


def test_scale_is_kept_and_a_texture_keeps_its_mesh() -> None:
    plain = sapien.render.RenderMaterial(base_color=[1, 0, 0, 1])
    shape = sapien.render.RenderShapeTriangleMesh(*ball(), plain)
    shape.scale = [1, 2, 3]
    scene = scene_with(shape)
    visuals.use_light_visuals(scene)
    body = scene.entities[0].find_component_by_type(sapien.render.RenderBodyComponent)
    (light,) = body.render_shapes
    assert len(light.parts[0].triangles) == visuals.MIN_TRIANGLES
    assert list(light.scale) == [1, 2, 3]
    low, high = body.compute_global_aabb_tight()
    np.testing.assert_allclose(high - low, [2, 4, 6], rtol=0.05)

    textured = sapien.render.RenderMaterial()
    textured.base_color_texture = sapien.render.RenderTexture2D(np.zeros((4, 4, 4), np.uint8), "r8g8b8a8unorm")
    scene = scene_with(sapien.render.RenderShapeTriangleMesh(*ball(), textured))
    visuals.use_light_visuals(scene)
    assert visuals.count_triangles(scene) == len(ball().triangles)


def grid(n: int = 30) -> Mesh:
    """A rectangle of 2 n² triangles; each cell of 1 by 2 shows half of a texture."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(n + 1), 2 * np.arange(n + 1), indexing="ij"))
    vertices = np.stack([x, y, np.full_like(x, -1)], 1).astype(np.float32)
    a = (np.arange(n)[:, None] * (n + 1) + np.arange(n)).ravel()
    triangles = np.concatenate([np.stack([a, a + n + 1, a + 1], 1), np.stack([a + n + 1, a + n + 2, a + 1], 1)])
    normals = np.tile(np.array([0, 0, 1], np.float32), (len(x), 1))
    return Mesh(vertices, triangles.astype(np.uint32), normals, np.stack([x / 2, y / 2], 1).astype(np.float32))


def test_a_textured_rectangle_becomes_two_triangles() -> None:
    mesh = grid()
    light = visuals.flat_rectangle(mesh)
    assert light is not None
    assert light.triangles.shape == (2, 3)
    np.testing.assert_allclose(light.vertices[:, :2] / 2, light.uvs, atol=1e-4)
    corners = light.vertices[light.triangles]
    np.testing.assert_array_equal(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2], 1800)
    np.testing.assert_array_equal(light.vertices.min(0), mesh.vertices.min(0))


@pytest.mark.parametrize(
    "other",
    [
        lambda mesh: mesh._replace(uvs=mesh.uvs**2),
        lambda mesh: mesh._replace(triangles=mesh.triangles[:-1]),
        lambda mesh: mesh._replace(vertices=mesh.vertices + np.eye(3, dtype=np.float32)[2] * mesh.vertices[:, :1]),
        lambda mesh: mesh._replace(normals=mesh.vertices),
    ],
    ids=["distorted texture", "hole", "slope", "rounded"],
)
def test_what_is_no_plain_rectangle_stays(other: Any) -> None:
    assert visuals.flat_rectangle(other(grid())) is None


def test_a_mesh_is_simplified_once(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = visuals.simplify(ball())
    (path,) = visuals.cache_folder().iterdir()
    monkeypatch.setattr(visuals, "decimate", None)
    for mine, cached in zip(first, visuals.simplify(ball())):
        np.testing.assert_array_equal(mine, cached)
    monkeypatch.setattr(visuals, "RATIO", 0.5)
    with pytest.raises(TypeError, match="NoneType"):
        visuals.simplify(ball())
    assert list(visuals.cache_folder().iterdir()) == [path]


def _pickled(path: Path) -> None:
    np.savez(path, vertices=np.array([{}], dtype=object))


def _foreign(path: Path) -> None:
    np.savez(path, weights=np.zeros(3))


def _out_of_range(path: Path) -> None:
    mesh = ball()
    np.savez(path, **mesh._replace(triangles=mesh.triangles + 100_000)._asdict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:300]),
        lambda path: path.write_bytes(b""),
        _pickled,
        _foreign,
        _out_of_range,
    ],
)
def test_a_damaged_file_is_made_again(damage: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = visuals.simplify(ball())
    (path,) = visuals.cache_folder().iterdir()
    damage(path)
    assert visuals.load_mesh(path) is None
    np.testing.assert_equal(visuals.simplify(ball()), first)
    np.testing.assert_equal(visuals.load_mesh(path), first)


def test_a_folder_that_cannot_be_written_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written .*set XDG_CACHE_HOME"):
        first = visuals.simplify(ball())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_equal(visuals.simplify(ball()), first)


def test_a_file_appears_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_space(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", no_space)
    with pytest.raises(OSError, match="no space"):
        visuals.save_mesh(tmp_path / "mesh.npz", ball())
    assert list(tmp_path.iterdir()) == []


def test_without_the_simplifier_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ValueError, match="visuals='light' needs fast-simplification.*pip install fast-simplification"):
        make_env("PickCube-v1", obs="rgb", image_size=8, visuals="light")
    make_env("PickCube-v1", obs="rgb", image_size=8, visuals="full").close()


@pytest.mark.parametrize(
    ("gpu", "teacher", "expected"),
    [
        (False, None, "light"),
        (False, PRIVILEGED, "light"),
        (False, LOOKER, "full"),
        (True, None, "full"),
        (True, LOOKER, "full"),
    ],
)
def test_the_default(gpu: bool, teacher: TeacherSpec | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert default_visuals(teacher) == expected
    assert with_visuals("PickCube-v1", {"obs": "rgb"}, teacher) == {"obs": "rgb", "visuals": expected}


def test_visuals_are_written_out_only_where_they_are_seen_and_open() -> None:
    assert with_visuals("PickCube-v1", {"obs": "rgb", "visuals": "full"}, None)["visuals"] == "full"
    assert with_visuals("PickCube-v1", {"obs": "rgb+state"}, None, default="full")["visuals"] == "full"
    assert with_visuals("PickCube-v1", {"reward": "dense"}, None) == {"reward": "dense"}
    assert with_visuals("CartPole-v1", {"obs": "rgb"}, None) == {"obs": "rgb"}


def test_environments_take_the_default_or_what_is_asked_for() -> None:
    def triangles(**options: Any) -> int:
        env = make_env("PickCube-v1", image_size=8, **options)
        n = visuals.count_triangles(scene_of(env))
        env.close()
        return n

    assert triangles(obs="rgb") <= 15_000
    assert triangles(teacher=LOOKER) > 150_000
    assert triangles(teacher=LOOKER, visuals="light") <= 15_000
    assert triangles(visuals="light") > 150_000, "nothing is drawn for a state"
