"""The eight ManiSkill tasks of the RPD paper: their instructions, and the attributes that hold their objects."""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """One task. Attribute names are those of the ManiSkill environment class (checked on 3.0.1)."""

    instruction: str
    """Language instruction (paper, Table I)."""
    object: str
    """Attribute of the actor to move."""
    tool: str | None = None
    """Attribute of the tool, or of the cube to stack on."""
    goal: str | None = None
    """Attribute of the actor that marks the goal."""


TASKS: dict[str, Task] = {
    "LiftPegUpright-v1": Task("lift the peg upright", object="peg"),
    "PickCube-v1": Task("pick up the cube", object="cube", goal="goal_site"),
    "PullCube-v1": Task("pull the cube towards the robot base", object="obj", goal="goal_region"),
    "PullCubeTool-v1": Task("pull the cube by using the red tool", object="cube", tool="l_shape_tool"),
    "PushCube-v1": Task("push the cube away from the robot base", object="obj", goal="goal_region"),
    "RollBall-v1": Task("push the ball", object="ball", goal="goal_region"),
    "StackCube-v1": Task("stack the red cube on the green cube", object="cubeA", tool="cubeB"),
    "PokeCube-v1": Task("push the cube by using the blue tool", object="cube", tool="peg", goal="goal_region"),
}
