"""Layout of the ``privileged`` teacher input: the simulator's state, in the robot's base frame.

In these tasks the robot's base turns only about the vertical axis, so z is height above the table.
Quaternions are (w, x, y, z). Fields that a task does not use are zero.
"""

from __future__ import annotations

FIELDS: dict[str, int] = {
    "tcp_pose": 7,  # tool centre point: xyz, quaternion
    "gripper": 1,  # opening of one finger in metres, 0 closed, 0.04 open
    "object_pose": 7,  # the thing to move: cube, peg, ball, red cube
    "object_velocity": 3,  # its linear velocity in m/s
    "tool_pose": 7,  # L-shaped tool, blue peg; the green cube to stack on
    "goal": 3,  # where the object should end
}

SIZE = sum(FIELDS.values())
"""Length S of the vector."""


def field_slices() -> dict[str, slice]:
    """The slice of the vector that each field lies in."""
    slices = {}
    start = 0
    for name, length in FIELDS.items():
        slices[name] = slice(start, start + length)
        start += length
    return slices
