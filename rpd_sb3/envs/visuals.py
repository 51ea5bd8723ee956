"""Light visuals: the same scene drawn with few triangles, for frames that a CPU renders.

Only what is drawn changes: collision shapes, physics, seeds and state observations stay as they are, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import fast_simplification
import mani_skill
import numpy as np
import sapien
import trimesh

RATIO = 0.04
"""Share of its triangles that a mesh keeps."""
MIN_TRIANGLES = 150
"""A part of a mesh never gets fewer."""
CREASE = np.radians(40)
"""Neighbouring triangles that meet at a larger angle are shaded as an edge."""


class Mesh(NamedTuple):
    """Triangles with one material."""

    vertices: np.ndarray
    """``(V, 3)``"""
    triangles: np.ndarray
    """``(F, 3)`` rows of ``vertices``"""
    normals: np.ndarray
    """``(V, 3)``"""
    uvs: np.ndarray
    """``(V, 2)`` of the texture"""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rpd_sb3" / f"visuals-{mani_skill.__version__}"


def use_light_visuals(scene: Any) -> None:
    for entity in scene.entities:
        body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        if body is None:
            continue
        if max((len(p.triangles) for s in body.render_shapes for p in s.parts), default=0) < 1000:
            continue
        shapes = [light for shape in body.render_shapes for light in _light_shapes(shape)]
        light = sapien.render.RenderBodyComponent()
        light.name = body.name
        for s in shapes:
            light.attach(s)
        light.visibility = body.visibility
        entity.remove_component(body)
        entity.add_component(light)


def _light_shapes(shape):
    if not isinstance(shape, sapien.render.RenderShapeTriangleMesh):
        return [shape.clone()]
    shapes = []
    for part in shape.parts:
        mesh = Mesh(np.array(part.vertices)*np.array(shape.scale), np.array(part.triangles).reshape(-1, 3), np.array(part.get_vertex_normal()), np.array(part.get_vertex_uv()))
        mesh = simplified(mesh, part.material.base_color_texture is not None)
        new = sapien.render.RenderShapeTriangleMesh(*[np.ascontiguousarray(x) for x in mesh], part.material)
        new.local_pose = shape.local_pose
        shapes.append(new)
    return shapes


def simplified(mesh: Mesh, textured: bool) -> Mesh:
    target = max(int(RATIO * len(mesh.triangles)), MIN_TRIANGLES)
    if len(mesh.triangles) <= target:
        return mesh
    if np.ptp(mesh.vertices[:, 2]) == 0 and textured:
        lo, hi = mesh.vertices.min(0), mesh.vertices.max(0)
        A = np.c_[mesh.vertices[:, :2], np.ones(len(mesh.vertices))]
        coef, *_ = np.linalg.lstsq(A.astype(float), mesh.uvs.astype(float), rcond=None)
        n = int(os.environ.get("GN", 1))
        x = np.linspace(lo[0], hi[0], n + 1); y = np.linspace(lo[1], hi[1], n + 1)
        v = np.array([[a, b, lo[2]] for a in x for b in y])
        t = []
        for i in range(n):
            for j in range(n):
                k = i * (n + 1) + j
                t += [[k, k + n + 1, k + 1], [k + n + 1, k + n + 2, k + 1]]
        return Mesh(v, np.array(t), np.tile([0, 0, 1.0], (len(v), 1)), np.c_[v[:, :2], np.ones(len(v))] @ coef)
    if textured:
        return mesh
    m = trimesh.Trimesh(mesh.vertices, mesh.triangles, process=False)
    m.merge_vertices(merge_norm=True, merge_tex=True)
    v, f = fast_simplification.simplify(np.asarray(m.vertices, np.float32), np.asarray(m.faces, np.int32), target_count=target)
    m = trimesh.graph.smooth_shade(trimesh.Trimesh(v, f, process=False), angle=CREASE)
    return Mesh(m.vertices, m.faces, m.vertex_normals, np.zeros((len(m.vertices), 2)))
