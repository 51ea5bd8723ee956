"""The OpenVLA model for any batch size and mixed instructions: two vision towers, a projector and Llama.

Each row is laid out as ``[BOS | P patches | PAD ... | rest of the text]``, so that the last token of every prompt is the last
column; pads are masked, and positions count real tokens only. The result is the same as for one row at a time.

Shape letters: B rows, P patches, T text tokens after BOS, S = 1 + P + T, A action tokens, V vocabulary, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rpd_sb3.teachers.openvla.vision import Projector, TowerShape, VisionBackbone


class Batch(NamedTuple):
    """The prompts of a batch."""

    pixels: th.Tensor
    """``(B, 6, 224, 224)``, normalized."""
    bos: th.Tensor
    """``(B, 1)`` int64."""
    text: th.Tensor
    """``(B, T)`` int64, padded on the left."""
    real: th.Tensor | None
    """``(B, T)`` bool, False for the padding of ``text``; None if there is none."""


def batch_texts(prompts: Sequence[Sequence[int]], device: th.device) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
    """``bos``, ``text`` and ``real`` of :class:`Batch` from token ids that begin with BOS."""
    longest = max(map(len, prompts)) - 1
    fill = [longest - (len(ids) - 1) for ids in prompts]
    text = th.tensor([[0] * n + list(ids[1:]) for ids, n in zip(prompts, fill)])
    real = None if not any(fill) else th.arange(longest)[None] >= th.tensor(fill)[:, None]
    bos = th.tensor([[ids[0]] for ids in prompts])
    return bos.to(device), text.to(device), None if real is None else real.to(device)


class KVCache:
    """Keys and values of all layers, for a length that is known beforehand; given to transformers as its Cache.

    :param config: of the language model
    :param n_rows: B
    :param length: tokens in all
    :param like: a tensor of the right device and dtype
    """

    def __init__(self, config: LlamaConfig, n_rows: int, length: int, like: th.Tensor) -> None:
        heads = config.num_key_value_heads or config.num_attention_heads
        dim = config.hidden_size // config.num_attention_heads
        self.values = like.new_empty(config.num_hidden_layers, 2, n_rows, heads, length, dim)
        self.length = 0

    def update(
        self, key: th.Tensor, value: th.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[th.Tensor, th.Tensor]:
        """Add a layer's keys and values ``(B, heads, n, dim)``.

        :return: keys and values of the layer so far, ``(B, heads, length + n, dim)`` each
        """
        end = self.length + key.shape[2]
        layer = self.values[layer_idx]
        layer[0, :, :, self.length : end] = key
        layer[1, :, :, self.length : end] = value
        return layer[0, :, :, :end], layer[1, :, :, :end]

    def repeated(self, n: int) -> KVCache:
        """A cache with each row ``n`` times."""
        copy = object.__new__(KVCache)
        copy.values = self.values.repeat_interleave(n, dim=2)
        copy.length = self.length
        return copy


class Prompted(NamedTuple):
    """A batch after its prompts, before any action token."""

    hidden: th.Tensor
    """``(B, E)`` of the last token."""
    cache: KVCache
    real: th.Tensor | None
    """``(B, S)`` bool; None: all of them."""
    position: th.Tensor
    """``(B, 1)`` of the next token."""

    def repeated(self, n: int) -> Prompted:
        """Each row ``n`` times."""
        real = None if self.real is None else self.real.repeat_interleave(n, dim=0)
        hidden, position = (x.repeat_interleave(n, dim=0) for x in (self.hidden, self.position))
        return Prompted(hidden, self.cache.repeated(n), real, position)


class OpenVLAModel(nn.Module):
    """OpenVLA; modules have the names that their weights have in the checkpoint.

    :param dino: sizes of ``vision_backbone.featurizer``
    :param siglip: sizes of ``vision_backbone.fused_featurizer``
    :param text_config: LlamaConfig's arguments
    """

    def __init__(self, dino: TowerShape, siglip: TowerShape, text_config: dict[str, Any]) -> None:
        super().__init__()
        options = text_config | {"tie_word_embeddings": False, "attn_implementation": "sdpa"}
        self.llama_config = LlamaConfig(**options)
        self.vision_backbone = VisionBackbone(dino, siglip)
        self.projector = Projector(dino.width + siglip.width, self.llama_config.hidden_size)
        self.language_model = LlamaForCausalLM(self.llama_config)

    def forward(self, batch: Batch, tokens: th.Tensor) -> th.Tensor:
        """Logits of given action tokens, for training: ``logits[:, i]`` after ``tokens[:, :i]``.

        :param batch: prompts
        :param tokens: ids ``(B, A)``; the last one is not read
        :return: ``(B, A, V)``
        """
        return self.language_model.lm_head(self.hidden(batch, tokens))

    def hidden(self, batch: Batch, tokens: th.Tensor) -> th.Tensor:
        """The hidden states that :meth:`forward` computes its logits from, ``(B, A, E)``."""
        embeddings, real, positions = self._embed(batch, tokens[:, :-1])
        hidden = self._llama(embeddings, positions, self._mask(real, embeddings.shape[1], 0, embeddings.device), None)
        return hidden[:, -tokens.shape[1] :]

    def read(self, batch: Batch, n_more: int) -> Prompted:
        """The state of the model after the prompts.

        :param batch: prompts
        :param n_more: number of tokens to leave room for in the cache
        """
        embeddings, real, positions = self._embed(batch, None)
        n_rows, length = embeddings.shape[:2]
        cache = KVCache(self.llama_config, n_rows, length + n_more, embeddings)
        hidden = self._llama(embeddings, positions, self._mask(real, length, 0, embeddings.device), cache)
        return Prompted(hidden[:, -1], cache, real, positions[:, -1:] + 1)

    def score(self, prompted: Prompted, tokens: th.Tensor) -> th.Tensor:
        """Logits ``(B, A, V)`` float32 of each action token, after those given before it.

        :param prompted: result of :meth:`read`, which can be used again
        :param tokens: ids ``(B, A)``; the last one is not read
        """
        n = tokens.shape[1] - 1
        cache, start = prompted.cache, prompted.cache.length
        positions = prompted.position + th.arange(n, device=tokens.device)
        mask = self._mask(prompted.real, n, start, tokens.device)
        hidden = self._llama(self.language_model.model.embed_tokens(tokens[:, :-1]), positions, mask, cache)
        cache.length = start
        return self.language_model.lm_head(th.cat([prompted.hidden[:, None], hidden], dim=1)).float()

    def generate(self, prompted: Prompted, n_tokens: int, noise: Noise | None = None) -> tuple[th.Tensor, th.Tensor]:
        """Action tokens one after the other.

        :param prompted: result of :meth:`read`, which can be used again
        :param n_tokens: A
        :param noise: samples action tokens; None: the most probable of all tokens
        :return: ids ``(B, A)``, logits ``(B, A, V)`` float32
        """
        cache, start = prompted.cache, prompted.cache.length
        hidden = prompted.hidden
        ids = []
        logits = []
        for i in range(n_tokens):
            logits.append(self.language_model.lm_head(hidden).float())
            ids.append(logits[-1].argmax(-1) if noise is None else noise.sample(logits[-1]))
            if i < n_tokens - 1:
                mask = self._mask(prompted.real, 1, start + i, hidden.device)
                embedding = self.language_model.model.embed_tokens(ids[-1][:, None])
                hidden = self._llama(embedding, prompted.position + i, mask, cache)[:, -1]
        cache.length = start
        return th.stack(ids, dim=1), th.stack(logits, dim=1)

    def _embed(self, batch: Batch, tokens: th.Tensor | None) -> tuple[th.Tensor, th.Tensor | None, th.Tensor]:
        """Embeddings ``(B, S, E)``, real ``(B, S)`` or None, positions ``(B, S)``; ``tokens`` (B, n) follow the prompt."""
        embed = self.language_model.model.embed_tokens
        patches = self.projector(self.vision_backbone(batch.pixels))
        text, real = batch.text, batch.real
        if tokens is not None:
            text = th.cat([text, tokens], dim=1)
            real = None if real is None else th.cat([real, th.ones_like(tokens, dtype=th.bool)], dim=1)
        embeddings = th.cat([embed(batch.bos), patches, embed(text)], dim=1)
        if real is None:
            positions = th.arange(embeddings.shape[1], device=embeddings.device).expand(len(embeddings), -1)
            return embeddings, None, positions
        seen = real.new_ones(len(real), 1 + patches.shape[1])
        real = th.cat([seen, real], dim=1)
        return embeddings, real, real.cumsum(1) - 1

    @staticmethod
    def _mask(real: th.Tensor | None, n: int, start: int, device: th.device) -> th.Tensor | None:
        """Which tokens each of ``n`` tokens after ``start`` others attends to, ``(B or 1, 1, n, start + n)`` bool.

        None stands for all (one token) or for all up to itself (``start`` 0); the fastest kernels need that.
        BOS and the patches come before the pads, so every token attends to something.
        """
        if real is None and (n == 1 or start == 0):
            return None
        before = th.ones(n, start + n, dtype=th.bool, device=device).tril(start)[None, None]
        if real is None:
            return before
        after = real.new_ones(len(real), max(start + n - real.shape[1], 0))
        return before & th.cat([real, after], dim=1)[:, None, None, : start + n]

    def _llama(
        self, hidden: th.Tensor, positions: th.Tensor, mask: th.Tensor | None, cache: KVCache | None
    ) -> th.Tensor:
        """Hidden states after the last norm. Layers are called one by one, because LlamaModel would make a mask of its own."""
        model = self.language_model.model
        rotary = model.rotary_emb(hidden, position_ids=positions)
        for layer in model.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        if cache is not None:
            cache.length += hidden.shape[1]
        return model.norm(hidden)


class Noise(NamedTuple):
    """How tokens are sampled.

    Gumbel's way, so that it is one program on any device: argmax(logits / temperature + noise).
    """

    first: int
    """Id of the first action token; no others are sampled."""
    last: int
    temperature: float
    generator: th.Generator

    def sample(self, logits: th.Tensor) -> th.Tensor:
        """Ids ``(B,)`` from logits ``(B, V)``."""
        actions = logits[:, self.first : self.last + 1] / self.temperature
        noise = th.empty_like(actions).exponential_(generator=self.generator)
        return (actions - noise.log()).argmax(-1) + self.first
