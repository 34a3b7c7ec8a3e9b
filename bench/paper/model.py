"""A decoder with rotary positions, small enough for a CPU: no absolute positions for a student to learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyalign.nn import RewardHead


class Block(nn.Module):
    """Causal attention with rotary positions and a gated feed-forward layer, each behind an RMS norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        inner = 8 * -(-width // 3)  # as many parameters as a layer of 4 * width without a gate
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:  # (B, S, H) -> (B, S, H)
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = _rotate(qkv[0], *rotation), _rotate(qkv[1], *rotation)
        mixed = F.scaled_dot_product_attention(query, key, qkv[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, value = self.up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # x (B, heads, S, D); cosine, sine (S, D)
    left, right = x.chunk(2, -1)
    return x * cosine + torch.cat((-right, left), -1) * sine


class Transformer(nn.Module):
    """Tokens (B, S) to hidden states (B, S, H); ``embedding.weight`` is the head of the language model too, and
    ``score`` the head of the preference model, read at the last token."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.score = RewardHead(width)
        half = width // heads // 2
        self.register_buffer("frequencies", 1000.0 ** (-torch.arange(half) / half), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=width**-0.5 / ((2 * layers) ** 0.5 if residual else 1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        rotation = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        return self.norm(x)

    def body_parameters(self) -> int:
        """Parameters but for the embedding and the score's head, as scaling laws count them."""
        return sum(x.numel() for x in self.blocks.parameters())
