"""mPLUG's equations on a state dict: products, softmaxes and additive masks, nothing shared with the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BERT_EPS, CLIP_EPS = 1e-12, 1e-5
TEXT_FAR, IMAGE_FAR = -10000.0, -1e9


class Weights:
    """The part of a state dict below a prefix."""

    def __init__(self, state: dict[str, Tensor], prefix: str = ""):
        self.state, self.prefix = state, prefix

    def at(self, path: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{path}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def linear(self, path: str, x: Tensor) -> Tensor:
        return x @ self[f"{path}.weight"].T + self[f"{path}.bias"]

    def norm(self, path: str, x: Tensor, eps: float) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (variance + eps).sqrt() * self[f"{path}.weight"] + self[f"{path}.bias"]


def gelu(x: Tensor) -> Tensor:
    """Exact."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def quick_gelu(x: Tensor) -> Tensor:
    """As CLIP's."""
    return x / (1 + torch.exp(-1.702 * x))


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, added: Tensor | float) -> Tensor:
    """Head by head: scores are scaled, then `added` (B, 1, M or 1, N) comes to them."""
    size = q.shape[-1] // heads
    out = []
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(size)
        scores = scores + (added[:, 0] if isinstance(added, Tensor) else added)
        out.append(scores.softmax(-1) @ v[..., columns])
    return torch.cat(out, -1)


def padding(mask: Tensor, far: float) -> Tensor:
    """(B, N) of ones and zeros -> (B, 1, 1, N)."""
    return (1.0 - mask.double())[:, None, None, :] * far


def attention_block(w: Weights, x: Tensor, g: Tensor, added: Tensor | float, heads: int) -> Tensor:
    """x attends to g; dense, sum, LayerNorm."""
    q, k, v = w.linear("self.query", x), w.linear("self.key", g), w.linear("self.value", g)
    y = w.linear("output.dense", attention(q, k, v, heads, added))
    return w.norm("output.LayerNorm", x + y, BERT_EPS)


def feed_forward(w: Weights, x: Tensor) -> Tensor:
    """intermediate, GELU, dense, sum, LayerNorm."""
    y = w.linear("output.dense", gelu(w.linear("intermediate.dense", x)))
    return w.norm("output.LayerNorm", x + y, BERT_EPS)


def embeddings(w: Weights, ids: Tensor) -> Tensor:
    """LN(word + type 0 + position), token by token."""
    rows = torch.stack(
        [
            torch.stack(
                [
                    w["word_embeddings.weight"][token]
                    + w["token_type_embeddings.weight"][0]
                    + w["position_embeddings.weight"][position]
                    for position, token in enumerate(text.tolist())
                ]
            )
            for text in ids
        ]
    )
    return w.norm("LayerNorm", rows, BERT_EPS)


def text_encoder(state: dict[str, Tensor], ids: Tensor, mask: Tensor, layers: int, heads: int) -> Tensor:
    """(B, L) -> (B, L, D)."""
    w = Weights(state).at("text_encoder")
    x = embeddings(w.at("embeddings"), ids)
    for number in range(layers):
        layer = w.at(f"encoder.layer.{number}")
        x = attention_block(layer.at("attention"), x, x, padding(mask, TEXT_FAR), heads)
        x = feed_forward(layer, x)
    return x


def co_attention(layer: Weights, t: Tensor, text_mask: Tensor, v: Tensor, image_mask: Tensor, heads: int) -> Tensor:
    """The text's rows behind a layer that attends to the image, which stays as it is."""
    t = attention_block(layer.at("attention"), t, t, padding(text_mask, TEXT_FAR), heads)
    t = attention_block(layer.at("crossattention"), t, v, padding(image_mask, IMAGE_FAR), heads)
    return feed_forward(layer, t)


def connected(
    layer: Weights, t: Tensor, text_mask: Tensor, v: Tensor, image_mask: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """(image, text) behind a connected layer: the image's half is added to the image, the text's takes its place."""
    z = torch.cat((v, t), 1)
    z = attention_block(layer.at("attention"), z, z, padding(torch.cat((image_mask, text_mask), 1), TEXT_FAR), heads)
    z = feed_forward(layer, z)
    return v + z[:, : v.shape[1]], z[:, -t.shape[1] :]


def fusion(
    state: dict[str, Tensor], t: Tensor, text_mask: Tensor, v: Tensor, start: int, layers: int, stride: int, heads: int
) -> tuple[Tensor, Tensor]:
    """(image, text) behind the layers start .. start + layers - 1."""
    image_mask = torch.ones(v.shape[:2])
    for relative in range(layers):
        layer = Weights(state).at(f"fusion_encoder.encoder.layer.{start + relative}")
        if relative == 0 or relative % stride:
            t = co_attention(layer, t, text_mask, v, image_mask, heads)
        else:
            v, t = connected(layer, t, text_mask, v, image_mask, heads)
    return v, t


def decoder(
    state: dict[str, Tensor], ids: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor, layers: int, heads: int
) -> Tensor:
    """Logits (B, M, vocabulary)."""
    w = Weights(state).at("text_decoder")
    x = embeddings(w.at("bert.embeddings"), ids)
    length = ids.shape[1]
    sees = torch.zeros(len(ids), 1, length, length)
    for row in range(length):
        for key in range(row + 1):
            sees[:, 0, row, key] = mask[:, key].float()
    added = (1.0 - sees.double()) * TEXT_FAR
    for number in range(layers):
        layer = w.at(f"bert.encoder.layer.{number}")
        x = attention_block(layer.at("attention"), x, x, added, heads)
        x = attention_block(layer.at("crossattention"), x, memory, padding(memory_mask, IMAGE_FAR), heads)
        x = feed_forward(layer, x)
    head = w.at("cls.predictions")
    x = head.norm("transform.LayerNorm", gelu(head.linear("transform.dense", x)), BERT_EPS)
    return x @ w["bert.embeddings.word_embeddings.weight"].T + head["bias"]


def image_tower(state: dict[str, Tensor], images: Tensor, patch: int, depth: int, heads: int) -> Tensor:
    """CLIP's image tower without its projection, all tokens, the class token first."""
    w = Weights(state).at("visual_encoder")
    kernel = w["patch_embed.proj.weight"].flatten(1)
    side = images.shape[-1] // patch
    rows = [w["cls_token"][0].expand(len(images), 1, -1)]
    for i in range(side):
        for j in range(side):
            window = images[:, :, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            rows.append((window.flatten(1) @ kernel.T)[:, None])
    x = w.norm("norm_pre", torch.cat(rows, 1) + w["pos_embed"], CLIP_EPS)
    for number in range(depth):
        layer = w.at(f"blocks.{number}")
        q, k, v = layer.linear("attn.qkv", layer.norm("norm1", x, CLIP_EPS)).chunk(3, -1)
        x = x + layer.linear("attn.proj", attention(q, k, v, heads, 0.0))
        x = x + layer.linear("mlp.fc2", quick_gelu(layer.linear("mlp.fc1", layer.norm("norm2", x, CLIP_EPS))))
    return w.norm("norm", x, CLIP_EPS)


def projected(state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Of an image tower of another width."""
    w = Weights(state)
    return w.norm("visn_layer_norm", w.linear("visn_fc", tokens), BERT_EPS)


def next_token_losses(logits: Tensor, ids: Tensor, pad: int) -> list[list[float]]:
    """-log p of the tokens after the first, sequence by sequence, without padding."""
    found = []
    for row, text in zip(logits.log_softmax(-1), ids.tolist(), strict=True):
        found.append([-row[t, text[t + 1]] for t in range(len(text) - 1) if text[t + 1] != pad])
    return found
