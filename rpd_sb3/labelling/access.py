"""Finding the teacher of a VecEnv, however it is wrapped."""

from __future__ import annotations

from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_wrapper

from rpd_sb3.labelling.teacher_wrapper import TeacherWrapper
from rpd_sb3.labelling.vec_teacher import VecTeacher


def find_vec_teacher(venv: VecEnv | None) -> VecTeacher | None:
    """The VecTeacher among the wrappers, also below those that SB3 adds for images."""
    found = None if venv is None else unwrap_vec_wrapper(venv, VecTeacher)
    assert found is None or isinstance(found, VecTeacher)
    return found


def teacher_labels(venv: VecEnv) -> frozenset[str] | None:
    """The labels that the teacher gives in every environment; None if there is no teacher."""
    vec_teacher = find_vec_teacher(venv)
    if vec_teacher is not None:
        return vec_teacher.teacher.spec.labels
    if all(venv.env_is_wrapped(TeacherWrapper)):
        return frozenset.intersection(*venv.env_method("label_names"))
    return None


def check_labels_given(name: str, needs: frozenset[str], venv: VecEnv) -> None:
    """Check that the environments have a teacher that gives these labels.

    :param name: of the algorithm
    :param needs: labels
    :raises ValueError: if not
    """
    given = teacher_labels(venv)
    if given is None:
        raise ValueError(f"{name} needs a teacher: wrap the env, e.g. {name}(policy, VecTeacher(env, teacher))")
    if missing := needs - given:
        raise ValueError(f"{name} needs the labels {sorted(needs)}; the teacher does not give {sorted(missing)}")


def set_label_fraction(venv: VecEnv, fraction: float) -> None:
    """Change the share of transitions to label from the next step on, in an environment that has a teacher."""
    vec_teacher = find_vec_teacher(venv)
    if vec_teacher is not None:
        vec_teacher.set_label_fraction(fraction)
    else:
        venv.env_method("set_label_fraction", fraction)


def check_teacher_acts(name: str, venv: VecEnv) -> None:
    """Check that the environments' teacher can act.

    :param name: of the algorithm
    :raises ValueError: if it cannot
    """
    vec_teacher = find_vec_teacher(venv)
    if vec_teacher is None:
        raise ValueError(
            f"{name}: teacher_share needs a VecTeacher around the VecEnv, e.g. {name}(policy, VecTeacher(env, teacher), "
            "teacher_share=0.5); a TeacherWrapper labels, but does not act"
        )
    vec_teacher.check_can_act()


def set_teacher_share(venv: VecEnv, share: float) -> None:
    """Change the share of episodes that the teacher finishes, in an environment that has passed :func:`check_teacher_acts`."""
    vec_teacher = find_vec_teacher(venv)
    assert vec_teacher is not None, "checked before"
    vec_teacher.set_teacher_share(share)
