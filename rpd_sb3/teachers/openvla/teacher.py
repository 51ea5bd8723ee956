"""OpenVLA as a teacher.

Shape letters: N queries, A action dimensions (7), K samples, B rows of a padded batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from rpd_sb3.contract.bins import Bounds, to_actions
from rpd_sb3.contract.device import check_device
from rpd_sb3.contract.names import check_choice
from rpd_sb3.contract.teacher import GRIPPERS, Labels, LocalTeacher, Query, TeacherError, TeacherSpec
from rpd_sb3.teachers.openvla.checkpoint import open_checkpoint
from rpd_sb3.teachers.openvla.graphs import GraphRunner, Tensors
from rpd_sb3.teachers.openvla.images import Preprocessor, check_images
from rpd_sb3.teachers.openvla.loading import DTYPES, load_model
from rpd_sb3.teachers.openvla.model import Batch, Noise, batch_texts
from rpd_sb3.teachers.openvla.text import Prompts

BATCH_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""On a GPU batches are padded to one of these, so that a few recorded graphs serve all of them."""


class OpenVLATeacher(LocalTeacher):
    """OpenVLA's answers to batches of any size and mixed instructions, the same as one at a time.

    ``action`` (N, A) float32 is in the units of the dataset, unnormalized. ``logits`` (N, A, 256) float32 are of
    the action tokens in ascending order of the action: given the student's tokens where the query has them, else given its
    own. With ``n_samples``, ``action`` is the mean of samples and ``std`` (N, A) their standard deviation.

    :param path: checkpoint folder, or hub id ``org/name``
    :param unnorm_key: dataset whose statistics unnormalize the actions; None where there is only one
    :param camera: its images are the input ``images.<camera>``
    :param image_size: side of the images to ask the environment for, in pixels; None: any. 224 needs no resizing,
        256 is what published ManiSkill models were trained with
    :param device: as PyTorch names it; auto: cuda if there is one
    :param dtype: bf16, fp16 or fp32; auto: bf16 on a GPU, fp32 on a CPU
    :param n_samples: K; 0: the most probable tokens
    :param temperature: of the samples
    :param std_floor: least std of samples, in the units of the dataset
    :param seed: of the samples
    :param resize: ``pil`` (exact) or ``tensor`` (:class:`~rpd_sb3.teachers.openvla.images.Preprocessor`)
    :param center_crop: for models that were fine-tuned with random crops
    :param cuda_graphs: record a graph for each batch size on a GPU; the first answer of a size takes some seconds
    :param gripper: the checkpoint's convention, one of :data:`~rpd_sb3.contract.teacher.GRIPPERS`
    :param rotation: the checkpoint's convention, e.g. ``axis_angle``; None: not known
    :param rotation_sign: -1 if the environment turns the hand the other way than that of the demonstrations
    :param control_mode: ManiSkill controller that the checkpoint was trained for; None: not checked
    :raises ValueError: in one sentence, if the checkpoint or an argument cannot be used
    """

    def __init__(
        self,
        path: str,
        *,
        unnorm_key: str | None = None,
        camera: str = "human",
        image_size: int | None = 256,
        device: str = "auto",
        dtype: str = "auto",
        n_samples: int = 0,
        temperature: float = 1.0,
        std_floor: float = 0.02,
        seed: int = 0,
        resize: str = "pil",
        center_crop: bool = False,
        cuda_graphs: bool = True,
        gripper: str = "0..1",
        rotation: str | None = None,
        rotation_sign: int = 1,
        control_mode: str | None = None,
    ) -> None:
        super().__init__()
        if n_samples == 1 or n_samples < 0:
            raise ValueError(f"n_samples={n_samples} must be 0, or at least 2: one sample has no std")
        if not (0 < temperature < np.inf and 0 < std_floor < np.inf):
            raise ValueError(f"temperature={temperature} and std_floor={std_floor} must be positive")
        check_choice("OpenVLATeacher", "gripper", gripper, GRIPPERS)
        check_choice("OpenVLATeacher", "dtype", dtype, ("auto", *DTYPES))
        if rotation_sign not in (-1, 1):
            raise ValueError(f"rotation_sign={rotation_sign} must be 1 or -1")
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size={image_size} must be at least 1 pixel")
        self._device = th.device(check_device(device))
        on_gpu = self._device.type == "cuda"
        weights_dtype = DTYPES[("bf16" if on_gpu else "fp32") if dtype == "auto" else dtype]
        checkpoint = open_checkpoint(path)
        statistics = checkpoint.statistics(unnorm_key)
        self._bounds = Bounds(np.array(statistics.low), np.array(statistics.high))
        self._n_actions = len(statistics.low)
        self._n_bins = checkpoint.n_bins
        self._last_id = checkpoint.first_unused_id - 1
        self._prompts = Prompts(checkpoint.folder / "tokenizer.json")
        self._pixels = Preprocessor(checkpoint.normalization, self._device, weights_dtype, resize, center_crop)
        self._model = load_model(checkpoint, self._device, weights_dtype)
        self._n_samples = n_samples
        self._std_floor = std_floor
        generator = th.Generator(self._device).manual_seed(seed)
        self._noise = Noise(self._last_id + 1 - self._n_bins, self._last_id, temperature, generator)
        self._run = GraphRunner(self._answer, (generator,)) if on_gpu and cuda_graphs else self._answer
        self._sizes = BATCH_SIZES if on_gpu and cuda_graphs else ()
        self._image = f"images.{camera}"
        self.spec = TeacherSpec(
            name="openvla",
            labels=frozenset({"action", "logits"} | ({"std"} if n_samples else set())),
            inputs=(self._image, "instruction"),
            action_space=spaces.Box(-1.0, 1.0, (self._n_actions,), np.float32),
            image_sizes={} if image_size is None else {camera: (image_size, image_size)},
            control_mode=control_mode,
            stochastic=n_samples > 0,
            n_bins=self._n_bins,
            gripper=gripper,
            rotation=rotation,
            rotation_sign=rotation_sign,
            unnorm_key=statistics.key,
            token_bounds=(statistics.low, statistics.high),
            n_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            n_bytes=sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters()),
        )

    @th.inference_mode()
    def label(self, query: Query) -> Labels:
        """What OpenVLA would have done.

        :param query: ``inputs["images.<camera>"]`` (N, H, W, 3) uint8, ``inputs["instruction"]`` (N,) str; ``actions``
            (N, A) int tokens; actions of another type are ignored
        :raises ValueError: for images of another shape or type, or an empty instruction
        :raises TeacherError: for tokens of another shape or out of range
        """
        images = np.asarray(query.inputs[self._image])
        check_images(images, self._image)
        prompts = [self._prompts(str(text)) for text in query.inputs["instruction"]]
        n = len(images)
        size = next((size for size in self._sizes if size >= n), n)
        rows = np.arange(size) % n
        bos, text, real = batch_texts([prompts[row] for row in rows], self._device)
        pixels = self._pixels(images)
        if size > n:
            pixels = pixels[th.from_numpy(rows).to(self._device)]
        ids, logits, samples = self._run(pixels, bos, text, real, self._prefix(query.actions, rows))
        assert ids is not None
        assert logits is not None
        labels: Labels = {"action": self._actions(ids[:n]), "logits": logits[:n].cpu().numpy()}
        if samples is not None:
            drawn = self._actions(samples[:n])
            labels["action"] = drawn.mean(axis=1)
            labels["std"] = np.maximum(drawn.std(axis=1), self._std_floor)
        return labels

    def close(self) -> None:
        """Release the model's memory."""
        super().close()
        self._pixels.close()
        for name in ("_run", "_model"):
            self.__dict__.pop(name, None)

    def _answer(
        self, pixels: th.Tensor, bos: th.Tensor, text: th.Tensor, real: th.Tensor | None, prefix: th.Tensor | None
    ) -> Tensors:
        """Ids ``(B, A)``, logits ``(B, A, 256)`` in the order of our tokens, ids of samples ``(B, K, A)`` or None."""
        prompted = self._model.read(Batch(pixels, bos, text, real), self._n_actions - 1)
        ids, logits = self._model.generate(prompted, self._n_actions)
        if prefix is not None:
            logits = self._model.score(prompted, prefix)
        samples = None
        if self._n_samples:
            samples, _ = self._model.generate(prompted.repeated(self._n_samples), self._n_actions, self._noise)
            samples = samples.view(len(ids), self._n_samples, self._n_actions)
        # OpenVLA's last id stands for the lowest action.
        return ids, logits[..., self._noise.first : self._last_id + 1].flip(-1), samples

    def _prefix(self, actions: Any, rows: np.ndarray) -> th.Tensor | None:
        """Ids of the student's tokens; None if its actions are not tokens."""
        if actions is None or np.asarray(actions).dtype.kind not in "iu":
            return None
        tokens = np.asarray(actions)
        if tokens.shape[1:] != (self._n_actions,) or tokens.min() < 0 or tokens.max() >= self._n_bins:
            raise TeacherError(
                f"OpenVLA scores tokens (N, {self._n_actions}) from 0 to {self._n_bins - 1}, but got {tokens.shape} "
                f"from {tokens.min()} to {tokens.max()}"
            )
        return th.from_numpy(self._last_id - tokens[rows].astype(np.int64)).to(self._device)

    def _actions(self, ids: th.Tensor) -> np.ndarray:
        """Unnormalized actions of token ids; other ids than those of actions stand for the nearer end, as in upstream's code."""
        tokens = np.clip(self._last_id - ids.cpu().numpy(), 0, self._n_bins - 1)
        return to_actions(tokens, self._n_bins, self._bounds)
