"""Light visuals: a scene drawn with a twentieth of its triangles, for frames that a CPU renders.

On a CPU the time of a small frame is the time of its triangles: 157 056 for ``PickCube-v1``, 134 924 of them the arm's.
Only what is drawn changes: collision shapes, physics, random numbers and states stay as they are, bit for bit.

Shape letters: V vertices, F triangles.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mani_skill
import numpy as np
import sapien
import trimesh

VISUALS = ("full", "light")
RATIO = 0.03
"""Share of its triangles that a mesh keeps."""
MIN_TRIANGLES = 300
"""No mesh gets fewer triangles."""
AGGRESSIVENESS = 4
"""How boldly edges are collapsed. The library's 7 is faster, once, and lets half as many pixels again differ from the full scene."""
HEAVY = 1000
"""Meshes of at most so many triangles stay as they are."""
CREASE = np.radians(40)
"""Neighbouring triangles that meet at a larger angle are shaded as an edge."""


class Mesh(NamedTuple):
    """Triangles with one material."""

    vertices: np.ndarray
    """``(V, 3)`` float32"""
    triangles: np.ndarray
    """``(F, 3)`` uint32, rows of ``vertices``"""
    normals: np.ndarray
    """``(V, 3)`` float32"""
    uvs: np.ndarray
    """``(V, 2)`` float32, places in the textures"""


def use_light_visuals(scene: sapien.Scene) -> None:
    """Draw a scene's meshes with few triangles from now on; call it again for a scene that is built anew.

    Colours, materials, poses, scales, names, shading and visibility stay. Bodies without a mesh to simplify stay too.

    :raises ValueError: if fast-simplification is not installed
    """
    _import_simplifier()  # also if all meshes are cached: the same machine then always says the same
    for entity in scene.entities:
        body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        if body is None:
            continue
        shapes = [(shape, _light_shapes(shape)) for shape in body.render_shapes]
        if not any(light_shapes for _, light_shapes in shapes):
            continue
        light = sapien.render.RenderBodyComponent()
        light.name = body.name
        for shape, light_shapes in shapes:
            for light_shape in light_shapes or [shape.clone()]:
                light.attach(light_shape)
        light.visibility = body.visibility
        light.shading_mode = body.shading_mode
        if body.is_render_id_disabled:
            light.disable_render_id()
        entity.remove_component(body)
        entity.add_component(light)


def count_triangles(scene: sapien.Scene) -> int:
    """How many triangles a scene is drawn with, hidden bodies included."""
    bodies = [entity.find_component_by_type(sapien.render.RenderBodyComponent) for entity in scene.entities]
    return sum(len(part.triangles) for body in bodies if body for shape in body.render_shapes for part in shape.parts)


def _light_shapes(shape: Any) -> list[Any]:
    """The shape with simplified meshes: one shape for each of its parts, in the same order; none if it stays as it is.

    What has a texture stays, but for flat rectangles: a vertex that moves needs a new place in the texture, which the
    simplification does not give, and a new mesh has no tangents, without which relief is lit from the wrong side.
    """
    if not isinstance(shape, sapien.render.RenderShapeTriangleMesh):
        return []
    meshes: list[Mesh] = []
    simplified = False
    for part in shape.parts:
        mesh: Mesh | None = Mesh(part.vertices, part.triangles, part.get_vertex_normal(), part.get_vertex_uv())
        assert mesh is not None
        heavy = len(mesh.triangles) > HEAVY
        if has_texture(part.material):
            mesh = flat_rectangle(mesh) if heavy and part.material.normal_texture is None else None
        elif heavy:
            mesh = simplify(mesh)
        if mesh is None:
            return []
        simplified |= heavy
        meshes.append(mesh)
    return [_make_shape(shape, part.material, mesh) for part, mesh in zip(shape.parts, meshes)] if simplified else []


def _make_shape(shape: Any, material: Any, mesh: Mesh) -> Any:
    """A shape of one mesh, otherwise like ``shape``."""
    made = sapien.render.RenderShapeTriangleMesh(*map(np.ascontiguousarray, mesh), material)
    made.name = shape.name
    made.local_pose = shape.local_pose
    made.front_face = shape.front_face
    made.scale = shape.scale
    return made


def _import_simplifier() -> Any:
    try:
        import fast_simplification
    except ModuleNotFoundError as error:
        raise ValueError(
            "visuals='light' needs fast-simplification, which is not installed: pip install fast-simplification, or set "
            "visuals: full"
        ) from error
    return fast_simplification


def has_texture(material: Any) -> bool:
    """True if any of the material's textures is set."""
    kinds = ("base_color", "emission", "metallic", "normal", "roughness", "transmission")
    return any(getattr(material, f"{kind}_texture") is not None for kind in kinds)


def simplify(mesh: Mesh) -> Mesh:
    """The mesh, which has no texture, with few triangles; from the cache if it was simplified before."""
    settings = (RATIO, MIN_TRIANGLES, AGGRESSIVENESS, CREASE, _import_simplifier().__version__, trimesh.__version__)
    digest = hashlib.sha256(repr(settings).encode())
    for array in (mesh.vertices, mesh.triangles):
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    path = cache_folder() / f"{digest.hexdigest()}.npz"
    light = load_mesh(path)
    if light is None:
        light = decimate(mesh, max(int(RATIO * len(mesh.triangles)), MIN_TRIANGLES))
        try:
            save_mesh(path, light)
        except OSError as error:
            _warn_uncached(path.parent, error.strerror or str(error))
    return light


def decimate(mesh: Mesh, n_triangles: int) -> Mesh:
    """The mesh with about ``n_triangles``, by quadric edge collapse; sharp edges are shaded as such.

    Vertices that lie in the same place are one vertex for the collapse, whatever their normals: no gap opens between them.
    """
    whole = trimesh.Trimesh(mesh.vertices, mesh.triangles, process=False)
    whole.merge_vertices(merge_norm=True, merge_tex=True)
    vertices, triangles = _import_simplifier().simplify(
        np.asarray(whole.vertices, np.float32),
        np.asarray(whole.faces, np.int32),
        target_count=n_triangles,
        agg=AGGRESSIVENESS,
    )
    light = trimesh.graph.smooth_shade(trimesh.Trimesh(vertices, triangles, process=False), angle=CREASE)
    return Mesh(
        np.asarray(light.vertices, np.float32),
        np.asarray(light.faces, np.uint32),
        np.asarray(light.vertex_normals, np.float32),
        np.zeros((len(light.vertices), 2), np.float32),
    )


def flat_rectangle(mesh: Mesh) -> Mesh | None:
    """The same rectangle of two triangles, if the mesh is one that its texture lies on without distortion; else None."""
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    flat = np.flatnonzero(high == low)
    if len(flat) != 1 or np.ptp(mesh.normals, axis=0).max() > 0:
        return None
    u, v = (axis for axis in range(3) if axis != flat[0])
    places = np.column_stack([mesh.vertices[:, [u, v]], np.ones(len(mesh.vertices))]).astype(float)
    to_uv, *_ = np.linalg.lstsq(places, mesh.uvs.astype(float), rcond=None)
    corners = mesh.vertices[mesh.triangles].astype(float)
    areas = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, flat[0]] / 2
    covered = np.isclose(abs(areas.sum()), (high[u] - low[u]) * (high[v] - low[v]), rtol=1e-4)
    one_side = (areas > 0).all() or (areas < 0).all()
    if not covered or not one_side or np.abs(places @ to_uv - mesh.uvs).max() > 1e-4 * max(1.0, np.abs(mesh.uvs).max()):
        return None
    vertices = np.tile(low, (4, 1))
    vertices[[1, 2], u] = high[u]
    vertices[[2, 3], v] = high[v]
    triangles = np.array([[0, 1, 2], [0, 2, 3]], np.uint32)
    turned = np.cross(vertices[1] - vertices[0], vertices[2] - vertices[0])[flat[0]] * areas[0] < 0
    return Mesh(
        vertices,
        triangles[:, ::-1] if turned else triangles,
        mesh.normals[:4],
        (np.column_stack([vertices[:, [u, v]], np.ones(4)]) @ to_uv).astype(np.float32),
    )


def cache_folder() -> Path:
    """Where simplified meshes are kept; it may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rpd_sb3" / f"visuals-{mani_skill.__version__}"


def save_mesh(path: Path, mesh: Mesh) -> None:
    """Write a mesh, whole or not at all, also if other processes write the same one.

    :raises OSError: if the folder cannot be written
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".npz")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez_compressed(file, **mesh._asdict())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def load_mesh(path: Path) -> Mesh | None:
    """The mesh of a file; None if there is no such file, or what it holds is not a mesh."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mesh = Mesh(*(arrays[name] for name in Mesh._fields))
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile):
        return None
    n = len(mesh.vertices)
    shapes = [(n, 3), (len(mesh.triangles), 3), (n, 3), (n, 2)]
    kinds = [np.float32, np.uint32, np.float32, np.float32]
    whole = [array.shape for array in mesh] == shapes and [array.dtype for array in mesh] == kinds
    if not whole or not mesh.triangles.size or mesh.triangles.max() >= n or not np.isfinite(mesh.vertices).all():
        return None
    return mesh


@cache
def _warn_uncached(folder: Path, reason: str) -> None:
    warnings.warn(
        f"light visuals: {folder} cannot be written ({reason}): the meshes are simplified again for each environment; "
        "set XDG_CACHE_HOME to a folder that can"
    )
