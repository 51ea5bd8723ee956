"""A policy whose action tokens depend on one another: a causal transformer over them.

Shape letters: B batch, K tokens, V bins, T tokens of a pass, P tokens passed before, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import nn
from torch.nn import functional as F

from rpd_sb3.students.tokens import TokenPolicy, choose_tokens


class CausalBlock(nn.Module):
    """Pre-LN transformer block: attention to this token and those before it, then an MLP, each around a residual.

    :param d_model: D
    :param n_heads: H, which divides D
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm = nn.LayerNorm(d_model)
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.attention_out = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(
            nn.LayerNorm(d_model), nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )

    def forward(self, x: th.Tensor, past: th.Tensor | None = None) -> tuple[th.Tensor, th.Tensor]:
        """The block's output, and the keys and values that the next token attends to.

        :param x: ``(B, T, D)``; T is 1 if there is a past
        :param past: ``(2, B, H, P, D / H)``, keys and values of the tokens before; None: ``x`` starts the sequence
        :return: ``(B, T, D)``, and ``(2, B, H, P + T, D / H)``
        """
        n_batch, n_tokens, d_model = x.shape
        qkv = self.query_key_value(self.attention_norm(x)).view(n_batch, n_tokens, 3, self.n_heads, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        query = qkv[0]
        present = qkv[1:]
        keys_values = present if past is None else th.cat([past, present], dim=3)
        # With a past, the one query is the last token: it sees everything.
        attended = F.scaled_dot_product_attention(query, keys_values[0], keys_values[1], is_causal=past is None)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(n_batch, n_tokens, d_model))
        return x + self.mlp(x), keys_values


class TokenDecoder(nn.Module):
    """Logits of each action token given an observation's latent and the tokens before it.

    Position 0 holds the projected latent, position k > 0 the embedding of token k - 1; a learned vector of the position
    is added to both. The head, shared by all positions, starts near the uniform distribution whatever the policy's
    ``ortho_init``.

    :param latent_dim: size of the observation's latent
    :param n_tokens: K
    :param n_bins: V
    :param d_model: D, width of the transformer
    :param n_layers: number of blocks
    :param n_heads: attention heads of a block
    :raises ValueError: if the heads do not divide the width
    """

    def __init__(self, latent_dim: int, n_tokens: int, n_bins: int, d_model: int, n_layers: int, n_heads: int) -> None:
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide d_model={d_model}")
        super().__init__()
        self.n_tokens = n_tokens
        self.context = nn.Linear(latent_dim, d_model)
        self.embedding = nn.Embedding(n_bins, d_model)
        self.position = nn.Parameter(th.empty(n_tokens, d_model))
        self.blocks = nn.ModuleList(CausalBlock(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, n_bins)
        # GPT-2's. With 1.0, attention finds the latent later: after 300 updates of a task where one token is a function of
        # the observation, its negative log-likelihood was 5.0 instead of 3.8 nats.
        for parameter in (self.embedding.weight, self.position):
            nn.init.normal_(parameter, std=0.02)
        nn.init.orthogonal_(self.head.weight, gain=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, latent: th.Tensor, tokens: th.Tensor) -> th.Tensor:
        """Logits of every token in one pass (teacher forcing).

        :param latent: ``(B, latent_dim)``
        :param tokens: ``(B, K)`` int; token k is read by the logits of later tokens only
        :return: ``(B, K, V)``
        """
        x = th.cat([self.context(latent)[:, None], self.embedding(tokens[:, :-1])], dim=1) + self.position
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x))

    def generate(self, latent: th.Tensor, choose: Callable[[th.Tensor], th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
        """Tokens chosen one after the other, and the logits that each was chosen from.

        :param latent: ``(B, latent_dim)``
        :param choose: from the logits ``(B, V)`` of one token to its bin ``(B,)``
        :return: tokens ``(B, K)``, logits ``(B, K, V)``
        """
        tokens: list[th.Tensor] = []
        logits: list[th.Tensor] = []
        caches: list[th.Tensor | None] = [None] * len(self.blocks)
        x = self.context(latent)
        for k in range(self.n_tokens):
            x = (x + self.position[k])[:, None]
            for i, block in enumerate(self.blocks):
                x, caches[i] = block(x, caches[i])
            logits.append(self.head(self.norm(x[:, 0])))
            tokens.append(choose(logits[-1]))
            x = self.embedding(tokens[-1])
        return th.stack(tokens, dim=1), th.stack(logits, dim=1)


class AutoregressivePolicy(TokenPolicy):
    """Each token given those before it: a small causal transformer on top of the observation's latent.

    :param observation_space: as in TokenPolicy
    :param action_space: as in TokenPolicy
    :param lr_schedule: as in TokenPolicy
    :param d_model: width of the transformer
    :param n_layers: its blocks
    :param n_heads: attention heads of a block
    :param kwargs: TokenPolicy's other arguments
    :raises ValueError: as in TokenPolicy, or if the heads do not divide the width
    """

    autoregressive = True

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        d_model: int = 64,
        n_layers: int = 2,
        n_heads: int = 4,
        **kwargs: Any,
    ) -> None:
        self.d_model = d_model
        self.n_layers = n_layers
        self.n_heads = n_heads
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net: TokenDecoder = TokenDecoder(
            self.mlp_extractor.latent_dim_pi, self.n_tokens, self.n_bins, self.d_model, self.n_layers, self.n_heads
        )
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        sizes = {"d_model": self.d_model, "n_layers": self.n_layers, "n_heads": self.n_heads}
        return {**super()._get_constructor_parameters(), **sizes}

    def _logits(self, latent_pi: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.action_net(latent_pi, actions)

    def _choose(self, latent_pi: th.Tensor, temperature: float) -> tuple[th.Tensor, th.Tensor]:
        return self.action_net.generate(latent_pi, lambda logits: choose_tokens(logits, temperature))
