"""A teacher's interface: its spec, the queries that it gets, the labels that it answers with.

Shape letters: N queries in a batch, A action dimensions, S state values, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from gymnasium import spaces

TEACHER_PREFIX = "teacher/"
"""Observation keys with this prefix are the teacher's view; the student never sees them."""

INFO_PREFIX = "teacher_"
"""``info[INFO_PREFIX + name]`` is the teacher's label of that name for the transition."""

TEACHER_ACTED = INFO_PREFIX + "acted"
"""``info[TEACHER_ACTED]``: whether the teacher acted in this transition; there while it acts in some episodes."""

TEACHERS_EPISODE = "teachers_episode"
"""``info[TEACHERS_EPISODE]``, beside it: whether the teacher is to finish this episode, also where it ends before that. Of the
episodes that the student was to have alone, the others say nothing: those that fail last until the teacher takes over."""

EXECUTED_ACTION = "executed_action"
"""``info[EXECUTED_ACTION]``: the teacher's action as the environment got it, where the teacher acted."""

TIMEOUT = 60.0
"""Seconds that a teacher has for an answer, by default: of those who ask, and of the clients that they ask through."""

GRIPPERS = {"-1..1": (-1.0, 1.0), "0..1": (0.0, 1.0), "1..-1": (1.0, -1.0), "1..0": (1.0, 0.0)}
"""Values of a closed and of an open gripper: ManiSkill's, OpenVLA's and Octo's, and the same upside down."""

Labels = dict[str, np.ndarray]
"""Label name (``action``, ``std``, ``logits``, ...) to an array whose first dimension is N."""


class TeacherError(RuntimeError):
    """The teacher gave no answer, or an answer that cannot be used."""


class TeacherUnavailable(TeacherError):
    """No answer this time; the same question may be answered later.

    :param message: what happened
    :param retry_after: seconds that the teacher asks for; 0: it did not say
    """

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Query(NamedTuple):
    """A batch of observations, for each of which the teacher says what it would have done there.

    ``inputs`` maps the teacher's input names to arrays with first dimension N: ``privileged`` (N, S) float32,
    ``state`` (N, S) float32, ``images.<camera>`` (N, H, W, 3) uint8, ``instruction`` (N,) str.
    """

    inputs: Mapping[str, np.ndarray]
    env_ids: np.ndarray
    """(N,) int: which environment each row comes from."""
    episode_starts: np.ndarray
    """(N,) bool: True where a teacher with a memory must clear it: at the first observation of an episode, and where the
    observation before was not in a query."""
    actions: np.ndarray | None = None
    """(N, ...) the student's actions there, for teachers that score them; None without a student."""
    number: int | None = None
    """Counts the queries of one client, so that a teacher with a memory recognises a query that is repeated because it had no
    answer; None: no query is ever repeated. Such a teacher gets a query when the one before has been answered."""


def sees_images(inputs: Iterable[str]) -> bool:
    """True if any of a teacher's inputs is a camera's image.

    :param inputs: names, as in :attr:`TeacherSpec.inputs`
    """
    return any(name.startswith("images.") for name in inputs)


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher's inputs, labels and conventions; checked against the environment before training starts."""

    name: str
    labels: frozenset[str]
    inputs: tuple[str, ...]
    action_space: spaces.Space
    image_sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Camera name to (H, W); cameras that are not listed may have any size."""
    control_mode: str | None = None
    """Controller the actions are meant for; None: not tied to one."""
    env_id: str | None = None
    """The only environment that the teacher can label; None: any."""
    stateful: bool = False
    """True if answers depend on earlier queries of the same environment. The numbers of environments are not unique: who
    asks about other environments of the same numbers, as evaluations do, makes a teacher of its own."""
    stochastic: bool = False
    """True if answers are drawn at random, so that each depends on how many were drawn before. Evaluations then ask a second
    teacher, made with the same arguments: they must not change the labels of training."""
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Input name to the shape of one query; inputs that are not listed may have any."""
    n_bins: int | None = None
    """Bins of each action dimension, where the teacher has ``logits``."""
    gripper: str | None = None
    """The last dimension, closed to open: one of :data:`GRIPPERS`; None: no gripper, or the environment's own."""
    rotation: str | None = None
    """How the action turns the hand, e.g. ``axis_angle`` (ManiSkill's) or ``euler_xyz``; None: not known."""
    unnorm_key: str | None = None
    """Dataset whose statistics unnormalize the actions; None: the teacher has none."""
    rotation_sign: int = 1
    """-1 if the environment turns the other way: dimensions 3 to 5 of an action are to be negated."""
    token_bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """The actions (in the teacher's own convention) that the ends of the bins stand for; None: -1 and 1."""
    n_parameters: int | None = field(default=None, compare=False)
    """Weights of its network, for reports; None: it has none, or does not know. Replicas may differ in it."""
    n_bytes: int | None = field(default=None, compare=False)
    """What they take in memory."""


@runtime_checkable
class Teacher(Protocol):
    """Anything that answers queries. Implementations must not keep references to the query's arrays."""

    spec: TeacherSpec

    def submit(self, query: Query) -> Future[Labels]:
        """Start answering and return at once."""
        ...

    def close(self) -> None:
        """Release threads, sockets and memory; further queries are an error."""
        ...


class LocalTeacher:
    """A teacher in this process: implement :meth:`label`; one worker thread answers in the order of asking."""

    spec: TeacherSpec

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")

    def label(self, query: Query) -> Labels:
        """Answer a query.

        :param query: N questions
        :return: one array per name in ``spec.labels``, first dimension N
        """
        raise NotImplementedError

    def submit(self, query: Query) -> Future[Labels]:
        return self._executor.submit(self.label, query)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
