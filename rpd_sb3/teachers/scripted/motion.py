"""The parts of the scripted experts: rotations, smooth phases, reaching, grasping.

Everything is a pure function over a batch, in metres, radians and the robot's base frame; quaternions are (w, x, y, z).
Shape letters: N states in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rpd_sb3.contract.privileged import field_slices

GAIN = 1.5
"""Fraction of the remaining way that is commanded per step; the simulated arm covers about 0.4 of a command."""
METRES_PER_UNIT = 0.1
RADIANS_PER_UNIT = -0.1
"""Negative: ManiSkill inverts the sign of rotations (mani-skill/ManiSkill issue 1469)."""
REACH = 0.79
"""Horizontal distance from the base that a gripper pointing down can get to; beyond it the inverse kinematics
finds no answer and the arm freezes."""
REACH_PER_TILT = 0.2
"""What a radian of tilt adds to it, up to 0.2 rad (measured)."""
OPEN, CLOSED = 1.0, -1.0
HOVER = 0.08
"""Height of the tool centre point above a grasp point that is safe to travel at."""
GLIDE_TIME = 0.12
"""Way that a pushed cube slides on, over its speed, in seconds."""
SLICES = field_slices()


class State(NamedTuple):
    """The fields of the privileged vector, see :mod:`rpd_sb3.contract.privileged`."""

    tcp: np.ndarray
    """(N, 3)"""
    tcp_quat: np.ndarray
    """(N, 4)"""
    opening: np.ndarray
    """(N,) of one finger."""
    object: np.ndarray
    """(N, 3)"""
    object_quat: np.ndarray
    """(N, 4)"""
    velocity: np.ndarray
    """(N, 3) of the object."""
    tool: np.ndarray
    """(N, 3)"""
    tool_quat: np.ndarray
    """(N, 4)"""
    goal: np.ndarray
    """(N, 3)"""


def unpack(privileged: np.ndarray) -> State:
    """Name the parts of privileged vectors of shape (N, S)."""
    part = {name: np.asarray(privileged[:, where], np.float64) for name, where in SLICES.items()}
    return State(
        tcp=part["tcp_pose"][:, :3],
        tcp_quat=part["tcp_pose"][:, 3:],
        opening=part["gripper"][:, 0],
        object=part["object_pose"][:, :3],
        object_quat=part["object_pose"][:, 3:],
        velocity=part["object_velocity"],
        tool=part["tool_pose"][:, :3],
        tool_quat=part["tool_pose"][:, 3:],
        goal=part["goal"],
    )


def ramp(x: np.ndarray, start: float, end: float) -> np.ndarray:
    """0 at ``start``, 1 at ``end``, linear between, clipped outside; ``end < start`` makes it fall. Shape of ``x``."""
    return np.clip((x - start) / (end - start), 0.0, 1.0)


def blend(weight: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """``first`` where the weight (N,) is 1, ``second`` (both (N, ...)) where it is 0."""
    weight = weight.reshape(-1, *[1] * (np.ndim(first) - 1))
    return weight * first + (1 - weight) * second


def length(vector: np.ndarray) -> np.ndarray:
    """Euclidean norm over the last axis."""
    return np.sqrt(np.sum(vector * vector, axis=-1))


def flat(vector: np.ndarray) -> np.ndarray:
    """The horizontal part of vectors (N, 3)."""
    return vector * [1.0, 1.0, 0.0]


def upwards(height: np.ndarray) -> np.ndarray:
    """Vertical vectors (N, 3) of that length (N,)."""
    return height[:, None] * [0.0, 0.0, 1.0]


def cap(vector: np.ndarray, limit: float) -> np.ndarray:
    """Vectors (N, 3) shortened, direction kept, to a length of at most ``limit``."""
    return vector * np.minimum(limit / np.maximum(length(vector), 1e-9), 1.0)[:, None]


def multiply(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Quaternion product, (N, 4): first rotate by ``q``, then by ``p``."""
    pw, px, py, pz = p.T
    qw, qx, qy, qz = q.T
    return np.stack(
        [
            pw * qw - px * qx - py * qy - pz * qz,
            pw * qx + px * qw + py * qz - pz * qy,
            pw * qy - px * qz + py * qw + pz * qx,
            pw * qz + px * qy - py * qx + pz * qw,
        ],
        axis=-1,
    )


def conjugate(q: np.ndarray) -> np.ndarray:
    """Inverse rotation of a unit quaternion, (N, 4)."""
    return q * np.array([1.0, -1.0, -1.0, -1.0])


def rotate(q: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Vectors (N, 3) turned by quaternions (N, 4)."""
    pure = np.concatenate([np.zeros_like(vector[:, :1]), vector], axis=-1)
    return multiply(multiply(q, pure), conjugate(q))[:, 1:]


def axis(q: np.ndarray, index: int) -> np.ndarray:
    """Where the body axis of that index (0 x, 1 y, 2 z) points, (N, 3)."""
    return rotate(q, np.broadcast_to(np.eye(3)[index], (len(q), 3)))


def heading(vector: np.ndarray) -> np.ndarray:
    """Angle about the vertical of vectors (N, 3), (N,)."""
    return np.arctan2(vector[:, 1], vector[:, 0])


def pointing_down(yaw: np.ndarray, tilt: np.ndarray | float = 0.0) -> np.ndarray:
    """Orientation (N, 4) of a gripper that points straight down; it opens along its y axis.

    :param yaw: (N,) heading of the gripper's x axis
    :param tilt: (N,) or a number, how far the fingertips lean out, away from the robot; lengthens the reach
    """
    zero = np.zeros_like(yaw)
    down = np.stack([zero, np.cos(yaw / 2), np.sin(yaw / 2), zero], axis=-1)
    lean = np.stack([zero + np.cos(np.divide(tilt, 2)), zero, zero - np.sin(np.divide(tilt, 2)), zero], axis=-1)
    return multiply(lean, down)


def turn_to(current: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Shortest rotation between orientations (N, 4), as axis times angle, (N, 3)."""
    delta = multiply(target, conjugate(current))
    delta = np.where(delta[:, :1] < 0, -delta, delta)
    sine = length(delta[:, 1:])
    angle = 2 * np.arctan2(sine, delta[:, 0])
    return delta[:, 1:] * (angle / np.maximum(sine, 1e-9))[:, None]


def act(state: State, way: np.ndarray, turn: np.ndarray, gripper: np.ndarray | float) -> np.ndarray:
    """The action that goes some of the way, but never further than the arm can reach.

    :param way: (N, 3) from where the tool centre point is to where it should be
    :param turn: (N, 3) axis times angle, likewise
    :param gripper: (N,) or a number, 1 open to -1 closed
    :return: (N, 7) in [-1, 1]; the direction of turns that are too fast for the controller is kept
    """
    command = state.tcp[:, :2] + np.clip(GAIN * way[:, :2], -METRES_PER_UNIT, METRES_PER_UNIT)
    reach = REACH + REACH_PER_TILT * np.clip(axis(state.tcp_quat, 2)[:, 0], 0.0, 0.2)
    command *= np.minimum(reach / np.maximum(length(command), 1e-6), 1.0)[:, None]
    way = np.concatenate([command - state.tcp[:, :2], GAIN * way[:, 2:]], axis=-1)
    rotation = GAIN * turn / RADIANS_PER_UNIT
    rotation = rotation / np.maximum(length(rotation), 1.0)[:, None]
    finger = np.broadcast_to(gripper, len(way))[:, None]
    return np.concatenate([np.clip(way / METRES_PER_UNIT, -1.0, 1.0), rotation, finger], axis=-1)


def funnel(way: np.ndarray, unready: np.ndarray | float = 0.0, hover: np.ndarray | float = HOVER) -> np.ndarray:
    """Bend a straight way down to a point so that it comes from above.

    The target is a funnel over the point: the further aside or the less ready, the higher. A hand that is too low to
    travel rises first.

    :param way: (N, 3) from the tool centre point to the point
    :param unready: (N,) or a number, 1 to wait above the point, 0 to go down
    :param hover: (N,) or a number, height above the point that is safe to travel at; 0 where there is nothing in the way
    """
    aside = length(flat(way))
    height = hover * np.maximum(unready, ramp(aside, 0.01, 0.04))
    low = ramp(-way[:, 2], 0.05, 0.02) * ramp(aside, 0.015, 0.04) * hover / HOVER
    return np.concatenate([way[:, :2] * (1 - low)[:, None], way[:, 2:] + height[:, None]], axis=-1)


class Grasp(NamedTuple):
    """A grasp from above: arguments of :func:`act`, and whether the thing is held."""

    way: np.ndarray
    """(N, 3)"""
    turn: np.ndarray
    """(N, 3)"""
    gripper: np.ndarray
    """(N,)"""
    held: np.ndarray
    """(N,) 0 not held, 1 held between the fingers."""


def grasp(state: State, point: np.ndarray, along: np.ndarray, half_width: float) -> Grasp:
    """Reach a point from above with open fingers, and close them there; recovers from any lost or missed grasp.

    :param point: (N, 3) where the fingers close
    :param along: (N, 3) direction for the gripper's x axis, or its opposite if that is nearer, seen from above; fingers close
        at right angles to it
    :param half_width: of the thing, along the closing direction
    """
    now = heading(axis(state.tcp_quat, 0))
    off = heading(along) - now
    yaw = now + (off - np.pi * np.round(off / np.pi))
    way = point - state.tcp
    far = ramp(length(flat(point)), REACH - 0.04, REACH + 0.01)
    turn = turn_to(state.tcp_quat, pointing_down(yaw, tilt=0.25 * far))
    closed = ramp(state.opening, half_width + 0.006, half_width + 0.002)
    # A thing that slipped off centre while the fingers closed is still held.
    slack = 0.015 * closed * ramp(state.opening, 0.008, 0.014)
    aside = np.maximum(length(flat(way)) - slack, 0.0)
    near = ramp(np.hypot(aside, way[:, 2]), 0.025, 0.015)
    unready = np.maximum(ramp(length(turn), 0.2, 0.5), ramp(state.opening, half_width + 0.006, half_width))
    held = near * closed
    turn[:, 2] *= 1 - held  # what is held turns with the hand: there is no yaw left to correct
    return Grasp(blend(near, way, funnel(way, unready)), turn, OPEN + (CLOSED - OPEN) * near, held)


def push(
    state: State,
    goal: np.ndarray,
    standoff: float,
    height: float,
    stride: float = np.inf,
    lift_behind: bool = True,
    run_up: float = 0.015,
    slack: float = 0.015,
    rise: float = 0.015,
    hover: float = HOVER,
) -> np.ndarray:
    """Way of the tool centre point (N, 3) that gets behind the object, low, and pushes it straight to the goal.

    :param goal: (N, 3) where the object should go, a point on the table
    :param standoff: distance of the tool centre point from the object's centre on contact
    :param height: of the tool centre point above the table while pushing
    :param stride: longest way along the line to ask for while pushing
    :param lift_behind: False to stay low where the tool centre point is behind the object already
    :param run_up: distance from where it gets behind the object to where it meets it
    :param slack: how far aside of the line from the goal through the object, and beside the object, it may push
    :param rise: how far above the height it may push
    :param hover: height above the pushing height that is safe to travel at
    """
    course = flat(goal - state.object)
    direction = course / np.maximum(length(course), 1e-6)[:, None]
    back = flat(state.tcp - state.object)
    ahead = np.sum(back * direction, axis=-1)
    aside = back - ahead[:, None] * direction
    ready = (
        ramp(ahead, slack - 0.005 - standoff, slack - 0.015 - standoff)
        * ramp(length(aside), 2 * slack, slack)
        * ramp(state.tcp[:, 2], height + 2 * rise, height + rise)
    )
    # Who comes from above goes down where it gets behind, not on the object; who is low already is behind from contact on.
    high = ramp(state.tcp[:, 2], height + 0.02, height + 0.05)
    over = ramp(ahead + (run_up - 0.015) * high, 0.015 - standoff, 0.03 - standoff)
    behind = flat(state.object - (standoff + run_up) * direction) + [0, 0, height] - state.tcp
    glide = GLIDE_TIME * np.maximum(np.sum(state.velocity * direction, axis=-1), 0.0)
    along = np.clip(length(course) - glide - ahead - standoff - run_up, -stride, stride)
    # What leads back to the line is not shortened: a hand that errs must get behind the object again at full speed, too.
    onward = along[:, None] * direction - aside + upwards(behind[:, 2])
    return blend(ready, onward, funnel(behind, hover=hover * np.maximum(over, lift_behind)))
