"""mPLUG: an image tower, a text encoder, a skip-connected fusion of both, and a decoder that writes text.

V = image tower(images)                           [projected to D where its width is another]
T = text encoder(question or prompt)
V, T = fusion(V, T)
logits = decoder(text; memory),   memory = [V; T], or V alone
"""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import Tensor, nn

from fastpeft._compat import import_timm
from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug.beams import Generation, Hypothesis
from fastpeft.models.mplug.config import MPlugConfig
from fastpeft.models.mplug.generation import generate
from fastpeft.models.mplug.stacks import FusionEncoder, TextDecoder, TextEncoder
from fastpeft.models.mplug.stream import DecoderCache, LayerCache, Stream, join

# What the decoder attends to: image and text after the fusion, or the image tower's rows as they are.
ROUTES = ("fused", "image")


class MPlug(nn.Module):
    """The model. Parameters are named as in the published state dicts, the image tower's as timm names them.

    Args:
        config: sizes.
        visual_encoder: a timm VisionTransformer to be the image tower; CLIP's form by default.
    """

    def __init__(self, config: MPlugConfig, visual_encoder: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.visual_encoder = image_tower(config) if visual_encoder is None else visual_encoder
        if self.visual_encoder.embed_dim != config.image_width:
            raise FastPEFTError(
                f"the image tower is {self.visual_encoder.embed_dim} wide, the configuration says image_width "
                f"{config.image_width}"
            )
        if config.image_width != config.width:
            self.visn_fc = nn.Linear(config.image_width, config.width)
            self.visn_layer_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
            self.visn_dropout = nn.Dropout(config.dropout)
        self.text_encoder = TextEncoder(config)
        self.fusion_encoder = FusionEncoder(config)
        self.text_decoder = TextDecoder(config)
        for part in (self.text_encoder, self.fusion_encoder, self.text_decoder):
            part.apply(_initialise)
        if config.image_width != config.width:
            _initialise(self.visn_fc)

    @classmethod
    def from_config(cls, config: MPlugConfig) -> MPlug:
        """A model with random weights."""
        return cls(config)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        image_size: int | None = None,
        config: MPlugConfig | None = None,
        visual_encoder: nn.Module | None = None,
        **known: int,
    ) -> MPlug:
        """A model from a file: published, fine-tuned with the original code, or written by `save`.

        What became of the file's tensors is logged; `fastpeft.models.mplug.checkpoint.load_checkpoint` returns it.

        Args:
            path: a `.safetensors` file or a torch file.
            image_size: another than the file's, in pixels; the position table is brought to it.
            config: the sizes, where the file does not show them (see `infer_config`).
            visual_encoder: the image tower, if it is not CLIP's.
            known: `num_heads`, `image_heads`, `stride`, where only they are unlike the published models'.

        Raises:
            FastPEFTError: the file cannot be read, lacks a tensor that the model uses, or is of another model.
        """
        from fastpeft.models.mplug.checkpoint import model_from_checkpoint

        return model_from_checkpoint(cls, path, image_size, config, visual_encoder, **known)

    def save(self, path: str | os.PathLike) -> None:
        """Write the model under its published names, as `.safetensors`, or as `.pth`, `.pt` or `.bin`.

        Raises:
            FastPEFTError: another suffix; tensors of a tuning method, which `fastpeft.save` writes.
        """
        from fastpeft.models.mplug.checkpoint import save_checkpoint

        save_checkpoint(self, path)

    # The stages.

    def encode_image(self, images: Tensor) -> Stream:
        """Images (B, 3, H, W) -> all tokens (B, Ni, D), the class token first.

        Raises:
            FastPEFTError: images of another size than the model's.
        """
        side, found = self.config.image_size, tuple(images.shape[-2:])
        if found != (side, side):
            raise FastPEFTError(f"images of {side} x {side} pixels are expected, got {' x '.join(map(str, found))}")
        return self.project_image(self.visual_encoder.forward_features(images))

    def project_image(self, tokens: Tensor) -> Stream:
        """The image tower's tokens (B, Ni, image_width) in the width of everything else."""
        if self.config.image_width != self.config.width:
            tokens = self.visn_dropout(self.visn_layer_norm(self.visn_fc(tokens)))
        return Stream(tokens)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Stream:
        """Text (B, L), which of it is real (B, L) -> (B, L, D); longer where prompts stand before it."""
        self._check_text(ids, mask)
        self._check_vocabulary(ids)
        text = self._enter("text", Stream(self.text_encoder.embeddings(ids), mask))
        x = text.states
        for number, layer in self.text_encoder.encoder.numbered():
            x = self._call("text", number, layer, x, {"mask": text.mask})
        return Stream(x, text.mask)

    def fuse(self, text: Stream, image: Stream) -> tuple[Stream, Stream]:
        """Both streams after the fusion, (image, text)."""
        rows = image.states.shape[1]
        for number, layer in self.fusion_encoder.encoder.numbered():
            if not self.config.connected(number):
                options = {"mask": text.mask, "memory": image.states, "memory_mask": image.mask}
                text = Stream(self._call("fusion", number, layer, text.states, options), text.mask)
                continue
            both = join(image, text)
            x = self._call("fusion", number, layer, both.states, {"mask": both.mask})
            image = Stream(image.states + x[:, :rows], image.mask)
            text = Stream(x[:, rows:], text.mask)
        return image, text

    def memory(self, image: Stream, ids: Tensor | None, mask: Tensor | None = None, route: str = "fused") -> Stream:
        """What the decoder attends to.

        Args:
            image: from `encode_image`.
            ids: question or prompt (B, L); not read by the route "image".
            mask: bool (B, L), which of it is real; None for all.
            route: "fused": [V; T] after the fusion. "image": V as it comes from the image tower.

        Raises:
            FastPEFTError: another route, or on "fused" no text, or texts that are not one an image.
        """
        if route not in ROUTES:
            raise FastPEFTError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
        if route == "image":
            return image
        if ids is None:
            raise FastPEFTError('the route "fused" reads a text beside the image: give ids (B, L), or route="image"')
        if len(ids) != len(image.states):
            raise FastPEFTError(f"each image needs one text, got {len(image.states)} images and {len(ids)} texts")
        return join(*self.fuse(self.encode_text(ids, mask), image))

    def hidden(
        self, ids: Tensor, mask: Tensor | None, memory: Stream | None, cache: DecoderCache | None = None
    ) -> Tensor:
        """The decoder's states (B, M, D) of text (B, M); arguments as of `decode`."""
        first = 0 if cache is None else cache.length
        self._check_text(ids, mask, first)
        if first == 0:
            self._check_vocabulary(ids)
        memory_mask = None if memory is None else memory.mask
        text = Stream(self.text_decoder.bert.embeddings(ids, first), mask)
        if first == 0:
            text = self._enter("decoder", text)
        if cache is not None:
            text, memory_mask = self._continue(text, memory, cache)
        x = text.states
        states = None if memory is None else memory.states
        for number, layer in self.text_decoder.bert.encoder.numbered():
            options = {
                "mask": text.mask,
                "causal": True,
                "memory": states,
                "memory_mask": memory_mask,
                "cache": None if cache is None else cache.layers[number],
            }
            x = self._call("decoder", number, layer, x, options)
        return x[:, x.shape[1] - ids.shape[1] :]

    def decode(
        self, ids: Tensor, mask: Tensor | None, memory: Stream | None, cache: DecoderCache | None = None
    ) -> Tensor:
        """Logits (B, M, vocabulary) of text (B, M).

        Args:
            ids: with a cache the new tokens only.
            mask: bool (B, M), which of them are real; None for all.
            memory: from `memory`; not needed again once a cache has seen it.
            cache: keys and values of what was decoded before; grows.

        Raises:
            FastPEFTError: a text longer than the model has positions; no memory, and no cache that has one.
        """
        if memory is None and not (cache and cache.layers):
            raise FastPEFTError("the decoder needs a memory, or a cache that has seen one")
        return self.text_decoder.logits(self.hidden(ids, mask, memory, cache))

    def generate(self, memory: Stream, settings: Generation, start_ids: Tensor | None = None) -> list[list[Hypothesis]]:
        """Hypotheses of each example, best first; see `fastpeft.models.mplug.generation.generate`."""
        return generate(self, memory, settings, start_ids)

    # Losses.

    def caption_loss(self, ids: Tensor, memory: Stream, mask: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of all tokens but the first of every text.

        Args:
            ids: (B, M), filled up with the padding token behind the text.
            memory: of B samples.
            mask: bool (B, M), which tokens are text; None: all that are not the padding token.

        Returns:
            A scalar, at least fp32.
        """
        losses, real = self.token_losses(ids, memory, mask)
        return losses.sum() / real.sum().clamp(min=1)

    def vqa_loss(
        self, ids: Tensor, weights: Tensor, counts: Tensor, memory: Stream, mask: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the answers' negative log-likelihoods, per question.

            L = 1/B sum_a w_a sum_t -log p(a_t | a_<t, memory)

        Args:
            ids: answers (A, M), one question's after another's.
            weights: (A,).
            counts: int64 (B,), answers of each question.
            memory: of B questions.
            mask: as of `caption_loss`.

        Returns:
            A scalar, at least fp32.

        Raises:
            FastPEFTError: numbers of answers, weights, counts and questions that do not go together.
        """
        answers, questions = len(ids), len(memory.states)
        if len(counts) != questions:
            raise FastPEFTError(f"{len(counts)} counts of answers for a memory of {questions} questions")
        if len(weights) != answers:
            raise FastPEFTError(f"{answers} answers need as many weights, got {len(weights)}")
        memory = memory.repeat(counts)
        if len(memory.states) != answers:
            raise FastPEFTError(
                f"{answers} answers are given, but the counts of the {questions} questions sum up to "
                f"{len(memory.states)}"
            )
        losses, _ = self.token_losses(ids, memory, mask)
        return (losses.sum(1) * weights.to(losses.dtype)).sum() / len(counts)

    def token_losses(self, ids: Tensor, memory: Stream, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-log p of every token but the first, 0 where there is none, (B, M - 1), and bool (B, M - 1) where.

        Text is filled up behind its end, so that causality keeps what is real from seeing what is not, and only the
        states that predict a real token meet the vocabulary.

        Raises:
            FastPEFTError: a token that is not in the vocabulary, or a longer text than the model has positions.
        """
        self._check_vocabulary(ids)
        real = (ids != self.config.pad_id if mask is None else mask)[:, 1:]
        states = self.hidden(ids[:, :-1], None, memory)
        losses = self._losses(states[real], ids[:, 1:][real])
        return torch.zeros(real.shape, dtype=losses.dtype, device=losses.device).masked_scatter(real, losses), real

    def forward(
        self,
        images: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        decoder_ids: Tensor,
        decoder_mask: Tensor | None = None,
        route: str = "fused",
    ) -> Tensor:
        """Logits (B, M, vocabulary) of decoder_ids (B, M) for images (B, 3, H, W) and text (B, L)."""
        return self.decode(decoder_ids, decoder_mask, self.memory(self.encode_image(images), ids, mask, route))

    # What an adopting engine does differently.

    def _enter(self, stack: str, text: Stream) -> Stream:
        """What enters a stack, "text" or "decoder"."""
        return text

    def _call(self, stack: str, number: int, layer: nn.Module, x: Tensor, options: dict) -> Tensor:
        return layer(x, **options)

    def _losses(self, states: Tensor, targets: Tensor) -> Tensor:
        return self.text_decoder.losses(states, targets)

    def _continue(self, text: Stream, memory: Stream | None, cache: DecoderCache) -> tuple[Stream, Tensor | None]:
        """The text with the mask of everything that it sees, and the memory's mask; the cache learns of both."""
        if not cache.layers:
            cache.layers = [LayerCache() for _ in range(self.config.decoder_layers)]
            cache.memory_mask = memory.mask
        batch, rows = text.states.shape[:2]
        seen = 0 if cache.layers[0].k is None else cache.layers[0].k.shape[2]
        if text.mask is not None or cache.mask is not None:
            parts = (cache.mask, seen), (text.mask, rows)
            device = text.states.device
            written = [
                torch.ones(batch, count, dtype=torch.bool, device=device) if part is None else part
                for part, count in parts
            ]
            cache.mask = torch.cat(written, 1)
        cache.length += self._tokens(rows, cache.length)
        return Stream(text.states, cache.mask), cache.memory_mask

    def _tokens(self, rows: int, first: int) -> int:
        """How many of the rows that enter the decoder are tokens."""
        return rows

    def _check_text(self, ids: Tensor, mask: Tensor | None, first: int = 0) -> None:
        tokens = first + ids.shape[1]
        if tokens > self.config.max_positions:
            raise FastPEFTError(f"a text of {tokens} tokens is longer than the model's {self.config.max_positions}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != ids.shape):
            expected, found = tuple(ids.shape), tuple(mask.shape)
            raise FastPEFTError(f"a mask must be boolean and {expected}, got {mask.dtype} {found}")

    def _check_vocabulary(self, ids: Tensor) -> None:
        # A look at numbers on a GPU would wait for it, and what is traced or compiled has none.
        if ids.device.type != "cpu" or type(ids) is not Tensor or torch.compiler.is_compiling():
            return
        strange = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if strange.numel():
            raise FastPEFTError(
                f"the text has token {strange[0].item()}, but the model's vocabulary has {self.config.vocab_size}"
            )


def image_tower(config: MPlugConfig) -> nn.Module:
    """CLIP's image tower: pre-norm, a LayerNorm before the blocks, quick GELU, no bias in the patches' projection."""
    import_timm()
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.image_width,
        depth=config.image_depth,
        num_heads=config.image_heads,
        num_classes=0,
        global_pool="",
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=QuickGELU,
        attn_drop_rate=config.attention_dropout,
    )


def _initialise(module: nn.Module) -> None:
    """As BERT begins: normal with deviation 0.02, biases 0."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
