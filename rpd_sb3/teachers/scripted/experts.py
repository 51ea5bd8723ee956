"""One scripted expert for each ManiSkill task: stand-ins for a vision-language-action model (VLA) that run offline.

They read the simulator's state and label any state that a student may reach. Each is a pure function of the current
state: no memory, and phases that are smooth weights. Lengths in metres are those of ManiSkill 3.0.1; gains and margins
were tuned on seeds 10000 to 10099.

Shape letter: N states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rpd_sb3.teachers.scripted.motion import (
    CLOSED,
    Grasp,
    State,
    act,
    axis,
    blend,
    cap,
    flat,
    grasp,
    heading,
    length,
    pointing_down,
    push,
    ramp,
    turn_to,
    upwards,
)

CUBE = 0.02  # half its side, in every task
BALL = 0.035  # radius
PEG_LENGTH, PEG_WIDTH = 0.12, 0.025  # half of each
TOOL_WIDTH = 0.025  # half of the handle's
HOOK = (0.175, 0.0625)  # centre of the part that sticks out, along and beside the handle
PEG_GRIP = 0.09  # from the centre of the peg to where its end is lifted
LOOSE = 0.2  # gripper action that carries the peg but lets it turn about the fingers
CRADLE = -0.1  # gripper action that leaves 2.5 cm between the fingers: the ball rests against both


def pick_cube(state: State) -> np.ndarray:
    """Grasp the cube and carry it to the goal.

    The hand keeps its heading and the fingers turn the cube: a yaw to follow, which jumps by 90 degrees with the cube's
    symmetry, is the hardest part for a small student to regress (measured: it made up three quarters of the error).
    """
    pick = grasp(state, state.object, np.broadcast_to([1.0, 0.0, 0.0], state.object.shape), CUBE + 0.005)
    return act(state, blend(pick.held, state.goal - state.object, pick.way), pick.turn, pick.gripper)


def push_cube(state: State) -> np.ndarray:
    """Push the cube into the goal region with the closed gripper; to pull it, the far side is behind."""
    course = length(flat(state.goal - state.object))
    rest = ramp(course, 0.03, 0.06)  # near the centre of the goal nothing is left to do
    way = push(state, state.goal, CUBE + 0.01, CUBE) * rest[:, None]
    return act(state, way, turn_to(state.tcp_quat, pointing_down(0 * course)), CLOSED)


def stack_cube(state: State) -> np.ndarray:
    """Grasp the red cube, carry it over the green one, put it down there, let go and rise."""
    course = state.tool + [0, 0, 2 * CUBE] - state.object
    aside = length(flat(course))
    # As in pick_cube the hand keeps its heading. But beside a close neighbour the fingers only fit at right angles to the
    # line between the cubes.
    along = blend(ramp(aside, 0.09, 0.08), flat(course), np.broadcast_to([1.0, 0.0, 0.0], course.shape))
    pick = grasp(state, state.object, along, CUBE + 0.005)
    may_travel = ramp(course[:, 2], 0.0, -0.02)  # once above the green cube
    carry = flat(course) * may_travel[:, None] + upwards(course[:, 2] + 0.06 * ramp(aside, 0.01, 0.05))
    placed = ramp(aside, 0.02, 0.01) * ramp(np.abs(course[:, 2]), 0.01, 0.005)
    leave = upwards(course[:, 2] + 0.08 * ramp(state.opening, CUBE + 0.005, CUBE + 0.01))
    way = blend(placed, leave, blend(pick.held, carry, pick.way))
    return act(state, way, pick.turn * (1 - placed)[:, None], np.maximum(pick.gripper, 2 * placed + CLOSED))


def lift_peg_upright(state: State) -> np.ndarray:
    """Grasp the peg near its far end and swing that end up, while the other stays on the table.

    The hand alone would turn too slowly for the time limit, so the peg turns in a loose grip as well.
    """
    peg = axis(state.object_quat, 0)
    peg = peg * np.where(peg[:, :1] + 2 * peg[:, 2:] < 0, -1.0, 1.0)  # from the near or lower end to the other
    pick = grasp(state, state.object + PEG_GRIP * peg, peg, PEG_WIDTH)
    up = upwards(1 + 0 * pick.held)
    swing = (PEG_LENGTH + PEG_GRIP) * (up - peg[:, 2:] * peg)  # at right angles to the peg
    standing = PEG_LENGTH * np.abs(peg[:, 2]) + PEG_WIDTH * length(flat(peg))  # height of its centre then
    carry = cap(swing, 0.06) + 2 * upwards(standing - state.object[:, 2])
    gripper = blend(pick.held, LOOSE + 0 * pick.held, pick.gripper)
    return act(state, blend(pick.held, carry, pick.way), blend(pick.held, np.cross(peg, up), pick.turn), gripper)


def roll_ball(state: State) -> np.ndarray:
    """Cradle the ball between fingers that are nearly closed and sweep it towards the goal; it rolls on where the arm ends.

    It forgives: a student that sees the ball or its hand a centimetre beside where they are still rolls it into the goal.
    """
    course = state.goal - state.object
    # As fast as the arm is: the longer it takes, the further a hand that errs leads the ball astray. Always as fast, as a
    # student cannot see in one image how fast the ball rolls already.
    stride = 0.8 * 0.05 / 0.6  # 0.8 m/s, of 0.6 ways per step of 0.05 s
    height = BALL - 0.02
    way = push(
        state,
        state.goal,
        BALL - 0.005,
        height,
        stride,
        lift_behind=False,
        run_up=0.05,
        slack=0.04,
        rise=0.025,
        hover=0.14,
    )
    distance = length(flat(state.object))
    # A hand that leans out can put its fingertips behind a ball that is near the robot.
    turn = turn_to(state.tcp_quat, pointing_down(heading(course), tilt=-0.3 * ramp(distance, 0.4, 0.32)))
    in_reach = ramp(distance, 0.95, 0.85)[:, None]
    return act(state, way * in_reach, turn * in_reach, CRADLE)


def poke_cube(state: State) -> np.ndarray:
    """Grasp the peg near its tail, slide its head behind the cube and push the cube into the goal region."""
    aim = state.goal + [0.04, 0, 0]  # beyond the goal, lest the course swings round near the end
    rest = ramp(length(flat(state.goal - state.object)), 0.02, 0.04)
    course = flat(aim - state.object)
    peg = axis(state.tool_quat, 0)
    peg = peg * np.where(np.sum(peg * course, axis=-1, keepdims=True) < 0, -1.0, 1.0)  # from tail to head
    pick = grasp(state, state.tool - 0.08 * peg, peg, PEG_WIDTH)
    head = state._replace(tcp=state.tool + PEG_LENGTH * peg)
    carry = push(head, aim, CUBE, PEG_WIDTH + 0.003, stride=0.03, lift_behind=False) * rest[:, None]
    return act(state, blend(pick.held, carry, pick.way), _level(pick, peg, heading(course)), pick.gripper)


def pull_cube_tool(state: State) -> np.ndarray:
    """Grasp the handle near its end, put the hook down behind the cube and pull the cube towards the robot."""
    handle, side = axis(state.tool_quat, 0), axis(state.tool_quat, 1)
    pick = grasp(state, state.tool + 0.03 * handle, handle, TOOL_WIDTH)
    hook = state._replace(tcp=state.tool + HOOK[0] * handle + HOOK[1] * side)
    near_robot = state.object * [0, 1, 0] + [0.5, 0, 0]
    carry = push(hook, near_robot, CUBE + 0.025, TOOL_WIDTH)
    return act(state, blend(pick.held, carry, pick.way), _level(pick, handle, 0 * pick.held), pick.gripper)


def _level(pick: Grasp, tool: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Turn of the hand (N, 3): upright until it holds the tool, then such that the tool lies level at a heading.

    A tool held at its end sags in the grip; levelling it leans the fingertips out, which lengthens the reach as well.

    :param tool: (N, 3) long axis of the tool
    :param wanted: (N,) its heading
    """
    level = np.stack([np.cos(wanted), np.sin(wanted), 0 * wanted], axis=-1)
    roll = np.sum(pick.turn * tool, axis=-1, keepdims=True) * tool
    return blend(pick.held, np.cross(tool, level) + roll, pick.turn)


EXPERTS: dict[str, Callable[[State], np.ndarray]] = {
    "LiftPegUpright-v1": lift_peg_upright,
    "PickCube-v1": pick_cube,
    "PokeCube-v1": poke_cube,
    "PullCube-v1": push_cube,
    "PullCubeTool-v1": pull_cube_tool,
    "PushCube-v1": push_cube,
    "RollBall-v1": roll_ball,
    "StackCube-v1": stack_cube,
}
"""Environment id to a function from states to actions, (N, 7) in [-1, 1]."""
