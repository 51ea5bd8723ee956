"""The only training loop: PPO with four seams for distillation. Shape letters: B minibatch, A action dimensions.

``needs`` names the labels, ``prepare_rollout`` edits the rollout before the update, ``distill_loss`` is the term that is
distilled, and ``curriculum`` says which of the losses leads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, Schedule, TensorDict
from stable_baselines3.common.utils import explained_variance, safe_mean, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch.nn import functional as F

from rpd_sb3.algos.augmentation import shifted_images
from rpd_sb3.algos.buffers import (
    Imitation,
    LabelledDictRolloutBuffer,
    LabelledRolloutBuffer,
    LabelledSamples,
    Student,
)
from rpd_sb3.algos.curriculum import Curriculum, HandOver, curriculum_of_version_0_1
from rpd_sb3.algos.losses import clipped_surrogate, normalize_advantage
from rpd_sb3.algos.replay import DEVICES, LabelReplay, Pairs, check_fits, choose_device, pair_bytes
from rpd_sb3.contract.names import check_choice
from rpd_sb3.contract.teacher import INFO_PREFIX, TEACHERS_EPISODE, TeacherError
from rpd_sb3.labelling.access import check_labels_given, check_teacher_acts, set_label_fraction, set_teacher_share

Self = TypeVar("Self", bound="OnPolicyDistillation")

TAKEN = "taken_action"
"""Column of the label replay beside the labels: what the student did."""
OF_THE_RETURN = ("old_values", "old_log_prob", "advantages", "returns")
"""Fields of a minibatch that mean nothing where the teacher acted."""
MAX_MISSING = 0.5
"""Share of labels of one rollout that may fail to come before training stops."""


class OnPolicyDistillation(PPO):
    """PPO with seams for distillation; bit-identical to SB3's PPO as long as nothing is distilled.

    Subclasses say which labels they need and override :meth:`prepare_rollout`, :meth:`distill_loss`, or both. The
    environment must carry a teacher: ``VecTeacher`` around the VecEnv, or ``TeacherWrapper`` around each environment.

    ``target_kl`` stops the surrogate (and with it the entropy bonus) for the rest of the update, never the distillation
    term or the value loss: imitation alone moves a policy with a small std beyond any usual limit within minibatches.

    :param policy: as in PPO
    :param env: as in PPO, with a teacher
    :param distill_coef: weight of the distillation term, a number or a schedule of the remaining progress; at 0 the
        teacher is not asked
    :param success_cutoff: success rate of the last training episodes at which the reward takes over: the weight is 0 from
        there on, and back if the success rate falls below half of that. None: no hand-over
    :param reward_from: timesteps before which the reward does not take over, whatever the success rate: of a teacher that succeeds
        seldom, a few lucky episodes would end the imitation
    :param reward_learning_rate: learning rate while the reward leads, a number or a schedule: imitation learns from exact targets
        and stands a larger one than the policy gradient does. None: the same
    :param reward_ppo_coef: weight of the surrogate while the reward leads; None: ``ppo_coef``
    :param reward_log_std: the policy's ``log_std`` from the hand-over on, where it goes on to be learned: while imitation leads,
        much exploration only widens the labelled states; the reward needs little, as noise costs successes. None: as it was
    :param reward_freezes: modules of the policy that do not learn while the reward leads, such as ``pi_features_extractor`` and
        ``mlp_extractor.policy_net``, which leave an actor its last layer: with gSDE the layer that explores
    :param label_fraction: share of the student's transitions to label
    :param teacher_share: share of the training episodes that the teacher finishes, a number or a schedule of the remaining
        progress: the student begins, and the teacher takes over at a random step
        (:class:`~rpd_sb3.labelling.VecTeacher`), so that states that the student does not reach are labelled early.
        Transitions on which the teacher acted are imitated, and are left out of the surrogate, the value loss and the
        success rate. 0 while the reward leads
    :param label_replay: number of past labelled transitions that the imitation term draws from (dataset aggregation);
        0: only the current minibatch. Like SB3's replay buffers it is not part of a saved model: ``label_replay_buffer.save``
    :param replay_batch_size: pairs drawn from it for each minibatch; None: as many as the minibatch has
    :param imitation_updates: optimizer steps of the imitation term for each transition of a rollout, each on
        ``replay_batch_size`` pairs of the label replay: 1/8 of 256 pairs are 32 gradients for each transition. They follow
        PPO's epochs, which are left out where they have nothing to learn (no surrogate, no value loss, no entropy bonus).
        None: no steps of its own, the imitation term is a part of each minibatch of PPO's epochs
    :param replay_device: where the label replay lies: ``cuda``, ``cpu`` (the host's memory; with a model on a GPU, the next
        pairs are fetched while it computes), or ``auto``: the model's device if the full replay fits there, else ``cpu``
    :param image_shift: pixels by which the imitation term moves each image at random (:mod:`rpd_sb3.algos.augmentation`)
    :param ppo_coef: weight of the surrogate while imitation leads
    :param clip_range_high: upper side of the clip range (DAPO's clip-higher, Yu et al., 2025); None: ``clip_range``
    :param advantage_std_floor: lower bound of the divisor in advantage normalisation. Without reward, normalisation
        would blow critic noise up to unit variance and fight the teacher; 0 is SB3's behaviour
    :param kwargs: PPO's arguments
    :raises ValueError: if an argument is out of range or for a teacher where none is asked, or the environment has no teacher that
        gives the labels
    """

    needs: frozenset[str] = frozenset()
    """Labels that the teacher must give."""
    # Of models that were saved before there were such arguments.
    reward_log_std: float | None = None
    reward_freezes: tuple[str, ...] = ()

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *,
        distill_coef: float | Schedule = 1.0,
        success_cutoff: float | None = None,
        reward_from: int = 0,
        reward_learning_rate: float | Schedule | None = None,
        reward_ppo_coef: float | None = None,
        reward_log_std: float | None = None,
        reward_freezes: Sequence[str] | None = None,
        label_fraction: float = 1.0,
        teacher_share: float | Schedule = 0.0,
        label_replay: int = 0,
        replay_batch_size: int | None = None,
        imitation_updates: float | None = None,
        replay_device: str = "auto",
        image_shift: int = 0,
        ppo_coef: float = 1.0,
        clip_range_high: float | None = None,
        advantage_std_floor: float = 0.0,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        for name, value, least in (
            ("label_replay", label_replay, 0),
            ("replay_batch_size", replay_batch_size, 1),
            ("image_shift", image_shift, 0),
            ("advantage_std_floor", advantage_std_floor, 0),
        ):
            if value is not None and not value >= least:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be at least {least}")
        if not 0 < label_fraction <= 1:
            raise ValueError(f"{type(self).__name__}: label_fraction={label_fraction} must lie in (0, 1]")
        for name, value in (("clip_range_high", clip_range_high), ("imitation_updates", imitation_updates)):
            if value is not None and not value > 0:
                raise ValueError(f"{type(self).__name__}: {name}={value} must be positive")
        if not self.needs:
            of_labels: tuple[tuple[str, Any, Any], ...] = (
                ("label_fraction", label_fraction, 1.0),
                ("teacher_share", teacher_share, 0.0),
                ("label_replay", label_replay, 0),
                ("imitation_updates", imitation_updates, None),
                ("image_shift", image_shift, 0),
            )
            for name, value, unused in of_labels:
                if value != unused:
                    who = type(self).__name__
                    raise ValueError(f"{who}: {name}={value} is for a teacher's labels, and {who} asks none")
        if imitation_updates is not None and not (label_replay and replay_batch_size):
            raise ValueError(
                f"{type(self).__name__}: imitation_updates={imitation_updates} draws from past labels; it needs "
                f"label_replay={label_replay} above 0 and replay_batch_size={replay_batch_size} to be a number"
            )
        check_choice(type(self).__name__, "replay_device", replay_device, DEVICES)
        self.curriculum = Curriculum(distill_coef, ppo_coef, reward_learning_rate, teacher_share, reward_from)
        if success_cutoff is not None:
            self.curriculum.set_hand_over(HandOver("success", success_cutoff, returns=True), ppo_coef=reward_ppo_coef)
        elif reward_ppo_coef is not None:
            raise ValueError(
                f"{type(self).__name__}: {reward_ppo_coef=} needs success_cutoff: else the reward never leads"
            )
        super().__init__(policy, env, _init_setup_model=False, **kwargs)  # type: ignore[arg-type]
        self.reward_log_std = reward_log_std
        self.reward_freezes = tuple(reward_freezes or ())
        self.label_fraction = label_fraction
        self.label_replay = label_replay
        self.replay_batch_size = replay_batch_size
        self.imitation_updates = imitation_updates
        self.replay_device = replay_device
        self._owed_updates = 0.0
        self.image_shift = image_shift
        self.clip_range_high = clip_range_high
        self.advantage_std_floor = advantage_std_floor
        if _init_setup_model:
            self._check_teacher()
            self._setup_model()

    def _setup_model(self) -> None:
        if "_handed_over" in vars(self):  # loaded from a file of version 0.1
            self.curriculum = curriculum_of_version_0_1(vars(self))
        if self.rollout_buffer_class is None:
            dict_obs = isinstance(self.observation_space, spaces.Dict)
            self.rollout_buffer_class = LabelledDictRolloutBuffer if dict_obs else LabelledRolloutBuffer
        super()._setup_model()
        self._freeze()
        self.label_replay_buffer = None
        if self.label_replay:
            n_bytes = self.label_replay * self._pair_bytes()
            device = choose_device(self.replay_device, self.device, n_bytes)
            self.label_replay_buffer = LabelReplay(self.label_replay, device)
            self._check_replay()

    def _pair_bytes(self) -> int:
        return pair_bytes(self.observation_space, self.action_space, self.needs)

    def _check_replay(self) -> None:
        replay = self.label_replay_buffer
        if replay is not None and replay.size == 0 and self.env is not None:  # without one it only acts
            check_fits(type(self).__name__, replay.capacity, self._pair_bytes(), replay.device, self.device)

    def _freeze(self) -> None:
        """Let ``reward_freezes`` learn or not, as the curriculum says."""
        for name in self.reward_freezes:
            try:
                module = self.policy.get_submodule(name)
            except AttributeError as error:
                known = ", ".join(child for child, _ in self.policy.named_children())
                raise ValueError(
                    f"{type(self).__name__}: reward_freezes names {name!r}, but the policy's modules are {known} and parts of them"
                ) from error
            module.requires_grad_(not self.curriculum.reward_leads)

    def prepare_rollout(self) -> None:
        """Edit the full rollout buffer once, before it is shuffled."""

    def distill_loss(self, batch: LabelledSamples, student: Student) -> tuple[th.Tensor, Mapping[str, float]]:
        """The term that ``distill_coef`` weighs, to be minimised.

        :param batch: minibatch with labels
        :param student: the current policy on it
        :return: scalar, and values to log under ``train/``
        """
        raise NotImplementedError(f"{type(self).__name__} needs {set(self.needs)} but defines no distill_loss")

    def imitation(self, batch: LabelledSamples, student: Student) -> Imitation:
        """What the imitation term is computed on: the minibatch, or pairs of the label replay in its place; images shifted."""
        replay = self.label_replay_buffer
        if not batch.replayed and replay is not None and replay.size > 0:
            n = self.replay_batch_size or len(batch.labelled)
            batch, student = self._on_pairs(replay.sample(n, self.device))
        elif not batch.replayed and self.image_shift > 0:
            obs = shifted_images(batch.observations, self.observation_space, self.image_shift)
            student = self._student_on(obs, batch.actions)
        return Imitation(student.distribution, batch.labels, batch.labelled)

    def _on_pairs(self, pairs: Pairs) -> tuple[LabelledSamples, Student]:
        """Pairs of the label replay, images shifted, and the student there."""
        obs = shifted_images(pairs.observations, self.observation_space, self.image_shift)
        targets = dict(pairs.labels)
        actions, empty = targets.pop(TAKEN), th.empty(0)
        labelled = th.ones(len(actions), dtype=th.bool, device=self.device)
        batch = LabelledSamples(obs, actions, empty, empty, empty, empty, targets, labelled, ~labelled, replayed=True)
        return batch, self._student_on(obs, actions)

    def _student_on(self, obs: th.Tensor | TensorDict, actions: th.Tensor) -> Student:
        """How the student would act, and nothing else of it."""
        if hasattr(self.policy, "distribution_on"):  # tokens, of which each may depend on those before it
            distribution = self.policy.distribution_on(obs, actions)  # type: ignore[operator]
        else:
            distribution = self.policy.get_distribution(obs)
        return Student(distribution, th.empty(0), th.empty(0), None)

    def _check_teacher(self) -> None:
        if self.needs and self.env is not None:
            check_labels_given(type(self).__name__, self.needs, self.env)
            if self.curriculum.shares is not None:
                check_teacher_acts(type(self).__name__, self.env)

    def learn(self: Self, *args: Any, **kwargs: Any) -> Self:
        """As in PPO; TensorBoard's log name is that of the class.

        :raises ValueError: if the environment has no teacher that gives the labels, or the label replay does not fit, or
            what is for the reward's lead is given though it never leads
        """
        for name, value in {
            "reward_from": self.curriculum.reward_from or None,
            "reward_log_std": self.reward_log_std,
            "reward_freezes": self.reward_freezes or None,
        }.items():
            if value is not None and self.curriculum.hand_over is None:
                raise ValueError(
                    f"{type(self).__name__}: {name}={value} needs a hand-over: else the reward never leads"
                )
        if self.reward_log_std is not None and not hasattr(self.policy, "log_std"):
            raise ValueError(
                f"{type(self).__name__}: reward_log_std={self.reward_log_std} needs a Gaussian policy, got "
                f"{type(self.policy).__name__} on {self.action_space}"
            )
        self._check_teacher()
        self._check_replay()
        named = {} if len(args) >= 4 else {"tb_log_name": type(self).__name__}
        return super().learn(*args, **(named | kwargs))

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        # SB3 does this after each rollout; the first one of a resumed training would go by where the last training ended.
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        success_rate = safe_mean(self.ep_success_buffer) if self.ep_success_buffer else None
        led = self.curriculum.reward_leads
        self.curriculum.update(self.num_timesteps, self._current_progress_remaining, success_rate)
        if self.reward_log_std is not None and led != self.curriculum.reward_leads:
            self.policy.log_std.data.fill_(self.policy.log_std_init if led else self.reward_log_std)
        if self.needs:
            set_label_fraction(env, self.label_fraction if self.curriculum.distill_coef > 0 else 0.0)
        if self.curriculum.shares is not None:
            set_teacher_share(env, self.curriculum.teacher_share)
        completed = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        if self.curriculum.shares is not None:
            self.logger.record("rollout/teacher_share", float(rollout_buffer.teacher_acted.mean()))  # type: ignore[attr-defined]
        if self.needs and not completed:
            # SB3 keeps the observation from before the aborted step; the next rollout would pair it with the label (and
            # the consequences) of the one after.
            self._last_obs, self._last_episode_starts = callback.locals["new_obs"], callback.locals["dones"]
        return completed

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        # SB3 calls this once for each step that goes into the rollout buffer, and never for an aborted one.
        # Only the episodes that the student was to have alone tell its success.
        super()._update_info_buffer([{} if info.get(TEACHERS_EPISODE, False) else info for info in infos], dones)
        if self.needs:
            self.rollout_buffer.add_labels(infos, self.needs)  # type: ignore[attr-defined]

    def _gather_labels(self) -> None:
        if not self.needs:
            return
        buffer: Any = self.rollout_buffer
        missing = buffer.gather_labels(self.needs)
        if self.curriculum.distill_coef == 0:
            return
        if missing > MAX_MISSING:
            raise TeacherError(f"{missing:.0%} of this rollout's labels are missing; at most {MAX_MISSING:.0%} may")
        if not buffer.labels and self.label_fraction == 1.0:
            missing_keys = " ".join(INFO_PREFIX + name for name in sorted(self.needs))
            raise TeacherError(f"no transition of this rollout carries {missing_keys}")
        self.logger.record("rollout/missing_labels", missing)
        if self.label_replay_buffer is not None:
            columns = {TAKEN: buffer.actions, **buffer.labels}
            self.label_replay_buffer.extend(buffer.observations, columns, where=buffer.labelled)

    def train(self) -> None:
        """Update the policy with the rollout just collected: SB3's PPO plus the distillation term."""
        self._update_learning_rate(self.policy.optimizer)
        if (learning_rate := self.curriculum.learning_rate(self._current_progress_remaining)) is not None:
            update_learning_rate(self.policy.optimizer, learning_rate)
            self.logger.record("train/learning_rate", learning_rate)
        self._freeze()
        self._gather_labels()
        self.prepare_rollout()
        self.policy.set_training_mode(True)
        distill_coef = self.curriculum.distill_coef
        buffer: Any = self.rollout_buffer
        distils = distill_coef > 0 and bool(buffer.labels) and self.imitation_updates is None
        use_surrogate = True
        max_kl = None if self.target_kl is None or self.curriculum.surrogate_coef == 0 else 1.5 * self.target_kl
        logs: defaultdict[str, list[float]] = defaultdict(list)

        for epoch in range(self.n_epochs if self._ppo_learns() else 0):
            logs["approx_kl"].clear()  # like SB3, log that of the last epoch
            for batch in buffer.get(self.batch_size):
                student, surrogate, value_loss, approx_kl = self._ppo_losses(batch, logs)
                exceeded = max_kl is not None and approx_kl > max_kl
                if use_surrogate and exceeded and self.verbose >= 1:
                    print(f"Early stopping at step {epoch} due to reaching max kl: {approx_kl:.2f}")
                use_surrogate = use_surrogate and not exceeded
                loss = self.vf_coef * value_loss
                if use_surrogate or not distils:
                    loss = surrogate + loss
                if distils:
                    distill_loss, values = self.distill_loss(batch, student)
                    loss = loss + distill_coef * distill_loss
                    for name, value in {"distill_loss": distill_loss.item(), **values}.items():
                        logs[name].append(value)
                logs["loss"] = [loss.item()]
                if not (use_surrogate or distils):
                    break
                self._descend(loss)
            self._n_updates += 1
            if not (use_surrogate or distils):
                break
        self._imitate(logs)
        self._log_update(logs)
        if self.needs or "distill_loss" in logs:
            self.logger.record("train/distill_coef", distill_coef)

    def _ppo_learns(self) -> bool:
        """False if PPO's epochs would change nothing, and imitation has steps of its own."""
        coefs = (self.curriculum.surrogate_coef, self.vf_coef, self.ent_coef)
        return self.imitation_updates is None or any(coef != 0 for coef in coefs)

    def _imitate(self, logs: defaultdict[str, list[float]]) -> None:
        """``imitation_updates`` optimizer steps for each transition of the rollout, on the label replay alone."""
        replay, distill_coef = self.label_replay_buffer, self.curriculum.distill_coef
        if self.imitation_updates is None or replay is None or replay.size == 0 or distill_coef == 0:
            return
        self._owed_updates += self.imitation_updates * self.rollout_buffer.buffer_size * self.n_envs
        n_updates = round(self._owed_updates)
        self._owed_updates -= n_updates  # a fraction is left for the next rollout
        losses = []
        for pairs in replay.batches(n_updates, self.replay_batch_size or 0, self.device):
            loss, values = self.distill_loss(*self._on_pairs(pairs))
            self._descend(distill_coef * loss)
            losses.append(loss.detach())  # read at the end: a GPU would have to be waited for
            for name, value in values.items():
                logs[name].append(value)
        logs["distill_loss"] = [float(loss) for loss in losses]
        self.logger.record("train/imitation_updates", n_updates)

    def _descend(self, loss: th.Tensor) -> None:
        """One optimizer step."""
        self.policy.optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()

    def _ppo_losses(
        self, batch: LabelledSamples, logs: defaultdict[str, list[float]]
    ) -> tuple[Student, th.Tensor, th.Tensor, float]:
        """Surrogate (with entropy bonus), value loss and approximate KL of one minibatch, as SB3 computes them.

        Of the transitions on which the student acted; all zero if there are none.
        """
        actions = batch.actions
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        student = Student(copy(self.policy.action_dist), values.flatten(), log_prob, entropy)
        values, log_prob, entropy = student[1:]
        own = ~batch.teacher_acted
        if not own.any():
            zero = 0.0 * values.sum()
            return student, zero, zero, 0.0
        if not own.all():
            batch = batch._replace(**{name: getattr(batch, name)[own] for name in OF_THE_RETURN})
            values, log_prob, entropy = values[own], log_prob[own], None if entropy is None else entropy[own]

        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        probs = log_prob, batch.old_log_prob
        policy_loss, ratio = clipped_surrogate(*probs, self._advantages(batch), clip_range, self.clip_range_high)
        values_pred = values
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
            values_pred = batch.old_values + th.clamp(values - batch.old_values, -clip_range_vf, clip_range_vf)
        value_loss = F.mse_loss(batch.returns, values_pred)
        entropy_loss = -th.mean(-log_prob) if entropy is None else -th.mean(entropy)
        with th.no_grad():
            log_ratio = log_prob - batch.old_log_prob
            approx_kl = th.mean((th.exp(log_ratio) - 1) - log_ratio).item()
            clip_fraction = th.mean((th.abs(ratio - 1) > clip_range).float()).item()
        logs["policy_gradient_loss"].append(policy_loss.item())
        logs["value_loss"].append(value_loss.item())
        logs["entropy_loss"].append(entropy_loss.item())
        logs["clip_fraction"].append(clip_fraction)
        logs["approx_kl"].append(approx_kl)
        surrogate = self.ent_coef * entropy_loss
        if (coef := self.curriculum.surrogate_coef) > 0:
            surrogate = coef * policy_loss + surrogate
        return student, surrogate, value_loss, approx_kl

    def _log_update(self, values: Mapping[str, list[float]]) -> None:
        """Record the means over the minibatches, and SB3's own entries, under ``train/``."""
        record, buffer = self.logger.record, self.rollout_buffer
        for name, numbers in values.items():
            if numbers:  # else the teacher acted on all transitions
                record(f"train/{name}", safe_mean(numbers))
        if len(own := np.flatnonzero(~buffer.teacher_acted.T)):  # type: ignore[attr-defined]
            values_and_returns = buffer.values.flatten()[own], buffer.returns.flatten()[own]
            record("train/explained_variance", explained_variance(*values_and_returns))
        if hasattr(self.policy, "log_std"):
            record("train/std", th.exp(self.policy.log_std).mean().item())
        record("train/n_updates", self._n_updates, exclude="tensorboard")
        for name in ("clip_range", "clip_range_vf"):
            if (schedule := getattr(self, name)) is not None:
                record(f"train/{name}", schedule(self._current_progress_remaining))

    def _advantages(self, batch: LabelledSamples) -> th.Tensor:
        if self.normalize_advantage and len(batch.advantages) > 1:  # one sample has no std, see SB3's issue #325
            return normalize_advantage(batch.advantages, self.advantage_std_floor)
        return batch.advantages

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "label_replay_buffer"]
