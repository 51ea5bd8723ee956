"""One scripted expert per ManiSkill task: the stand-in for a vision-language-action model (VLA).

They see what only a simulator knows and label any state that a student may reach, so that everything runs offline.
Each is a pure function of the current state: no memory, no phases beyond smooth weights. Shape letters: N states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rpd_sb3.teachers.motion import CLOSED, OPEN, State, act, axis, blend, grasp, heading, length, offset, pointing_down, push, ramp, turn_to, wrap

CUBE = 0.02  # half of its side, the same in all tasks
BALL = 0.035
PEG_LENGTH, PEG_WIDTH = 0.12, 0.025  # half of them


def _cube_yaw(state: State, quat: np.ndarray) -> np.ndarray:
    """The one of the cube's four headings that is nearest to the gripper's, (N,)."""
    now = heading(axis(state.tcp_quat, 0))
    return now + wrap(heading(axis(quat, 0)) - now, np.pi / 2)


def pick_cube(state: State) -> np.ndarray:
    """Grasp the cube and carry it to the goal."""
    pick = grasp(state, state.object, _cube_yaw(state, state.object_quat), CUBE)
    return act(state, blend(pick.held, state.goal - state.object, pick.way), pick.turn, pick.gripper)


def push_cube(state: State) -> np.ndarray:
    """Push the cube into the goal region with the closed gripper; for pulling, the far side is behind."""
    course = length((state.goal - state.object)[:, :2])
    rest = ramp(course, 0.03, 0.06)  # near the centre nothing is left to do
    way = push(state, state.goal, CUBE + 0.01, CUBE) * rest[:, None]
    return act(state, way, turn_to(state.tcp_quat, pointing_down(0 * course)), CLOSED)


def stack_cube(state: State) -> np.ndarray:
    """Grasp the red cube, carry it over the green one, put it down there, let go and rise."""
    pick = grasp(state, state.object, _cube_yaw(state, state.object_quat), CUBE)
    course = state.tool + [0, 0, 2 * CUBE] - state.object
    aside = length(course[:, :2])
    placed = ramp(aside, 0.02, 0.01) * ramp(np.abs(course[:, 2]), 0.01, 0.005)
    carry = course + offset(course, z=0.06 * ramp(aside, 0.01, 0.05))
    carry[:, :2] *= ramp(course[:, 2], 0.0, -0.02)[:, None]  # rise before travelling
    free = ramp(state.opening, CUBE + 0.005, CUBE + 0.01)
    leave = offset(course, z=0.08 * free)
    way = blend(placed, leave, blend(pick.held, carry, pick.way))
    return act(state, way, pick.turn * (1 - placed)[:, None], blend(placed, OPEN + 0 * placed, pick.gripper))


def lift_peg_upright(state: State) -> np.ndarray:
    """Grasp the peg near its far end and turn that end up."""
    peg = axis(state.object_quat, 0)
    peg = peg * np.where(peg[:, :1] + 2 * peg[:, 2:] < 0, -1.0, 1.0)  # the axis from the low or near end to the other
    now = heading(axis(state.tcp_quat, 0))
    yaw = now + wrap(heading(peg) - now, np.pi)
    pick = grasp(state, state.object + 0.05 * peg, yaw, PEG_WIDTH)
    up = np.broadcast_to([0.0, 0.0, 1.0], peg.shape)
    erect = np.arctan2(length(np.cross(peg, up)), peg[:, 2])[:, None] * np.cross(peg, up) / np.maximum(length(np.cross(peg, up)), 1e-6)[:, None]
    level = PEG_LENGTH * peg[:, 2] + PEG_WIDTH * length(peg[:, :2])  # standing on its lower edge
    carry = offset(peg, z=level - state.object[:, 2])
    return act(state, blend(pick.held, carry, pick.way), blend(pick.held, erect, pick.turn), pick.gripper)


def roll_ball(state: State) -> np.ndarray:
    """Take the ball between half open fingers and sweep it towards the goal; it rolls on where the arm ends."""
    course = (state.goal - state.object) * [1, 1, 0]
    way = push(state, state.goal, BALL + 0.01, BALL)
    return act(state, way, turn_to(state.tcp_quat, pointing_down(heading(course))), 0.2)


EXPERTS: dict[str, Callable[[State], np.ndarray]] = {
    "PickCube-v1": pick_cube,
    "PushCube-v1": push_cube,
    "StackCube-v1": stack_cube,
    "LiftPegUpright-v1": lift_peg_upright,
    "RollBall-v1": roll_ball,
    "PullCube-v1": push_cube,
}
"""Environment id to a function from the state to actions (N, 7)."""
