"""Layout of the ``privileged`` teacher input: what only a simulator knows, in the robot's base frame.

The robot's base only ever turns about the vertical axis in the tasks at hand, so z is height above the table.
Quaternions are (w, x, y, z). Fields that a task has no use for are zero.
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
    """Where each field lies in the vector."""
    slices, start = {}, 0
    for name, length in FIELDS.items():
        slices[name] = slice(start, start + length)
        start += length
    return slices
