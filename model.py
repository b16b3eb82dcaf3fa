"""The Llama family in one file: the model, its tokenizer and chat template, and the loading of its checkpoints.

The batch size is always 1, so no tensor has a batch dimension. In the shapes, T is the number of tokens passed in,
C = d_model, I = d_ff, D = head_dim, Hq = n_heads, Hk = n_kv_heads, V = vocab_size.

The model keeps no KV cache and does not know how attention is computed: `Llama.forward` takes a callable
attend(layer, q, k, v) -> out, where q and out are (Hq, T, D), k and v are (Hk, T, D), and RoPE is applied to q and k.

Source: Touvron et al., LLaMA (arXiv 2302.13971); Peng et al., YaRN (arXiv 2309.00071); Hugging Face's checkpoint layout
and RoPE scalings.
"""

import codecs
import dataclasses
import itertools
import json
import math
import platform
import re
import secrets
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path

import huggingface_hub
import jinja2
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class LlamaConfig:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_model: int
    d_ff: int
    vocab_size: int
    context_len: int
    rope_theta: float
    rope_scaling: dict | None  # {"rope_type": ...} and the keys of ROPE_KEYS; None: no scaling
    rms_eps: float
    tie_embeddings: bool
    attention_bias: bool  # of q, k and v
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    output_bias: bool = False  # of the projection after attention
    qk_norm: bool = False  # Qwen3 normalises each head of q and k before RoPE
    nope_layers: tuple[int, ...] = ()  # SmolLM3 has layers without RoPE

    @staticmethod
    def from_json(raw: dict) -> "LlamaConfig":
        """Make one from the contents of a Hugging Face config.json, of transformers 4 or 5. Raises ModelError."""
        try:
            return _read_config(raw)
        except KeyError as error:
            raise ModelError(f"config.json: the key {error} is missing")
        except (TypeError, ValueError, ArithmeticError, IndexError) as error:
            raise ModelError(f"config.json: {error}")


class Llama(nn.Module):
    """The parameters are left uninitialised: `load_model` fills them."""

    def __init__(self, config: LlamaConfig, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config = config
        self.residual_dtype, self.kv_dtype = activation_dtypes(dtype, device)  # kv_dtype: of q, k, v and their cache
        with torch.device("meta"):
            self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
            self.blocks = nn.ModuleList(Block(layer, config) for layer in range(config.n_layers))
            self.norm = RMSNorm(config.d_model, config.rms_eps)
            self.head = Linear(config.d_model, config.vocab_size, False)
        self.to(dtype).to_empty(device=device).requires_grad_(False)
        if config.tie_embeddings:
            self.head.weight = self.embed
        freq, self.rope_scale = rope_frequencies(config, device)  # (D/2,)
        self.register_buffer("rope_freq", torch.cat((-freq, freq)), persistent=False)  # (D,)

    @property
    def device(self):
        return self.embed.device

    @property
    def dtype(self):
        return self.embed.dtype

    @torch.inference_mode()
    def hidden(self, tokens, positions, attend, fused=None):
        """tokens (T,) int64 at positions (T,) int64 -> the final, normed hidden states (T, C)."""
        x = F.embedding(tokens, self.embed).to(self.residual_dtype)  # (T, C)
        cos = sin = None
        if not fused:
            angles = positions[:, None] * self.rope_freq  # (T, D); no table, because a context can be a million tokens
            cos, sin = angles.cos(), angles.sin()  # (T, D), (T, D): the first half of sin is negated
            if self.rope_scale != 1:
                cos, sin = cos * self.rope_scale, sin * self.rope_scale  # (T, D), (T, D)
        for block in self.blocks:
            x = block(x, cos, sin, attend, self.kv_dtype, fused)  # (T, C)
        return self.norm(x, product_dtype(self.head.weight, len(x)))  # (T, C)

    @torch.inference_mode()
    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32."""
        return self.head(hidden).float()  # (..., V)

    @torch.inference_mode()
    def forward(self, tokens, positions, attend, fused=None):
        """tokens (T,) int64 at positions (T,) int64 -> the last position's logits (V,) float32."""
        with fastest_backend(len(tokens), self.device):
            return self.logits(self.hidden(tokens, positions, attend, fused)[-1:])[0]  # (V,)

    def rope(self, layer):
        """A layer's radians per position (D,), the first half negated, and a factor of q and k."""
        if self.blocks[layer].has_rope:
            return self.rope_freq, self.rope_scale  # (D,)
        return torch.zeros_like(self.rope_freq), 1.0  # (D,)


class Block(nn.Module):
    """Attention, then SwiGLU; each normalises its input and adds its output to the residual stream."""

    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.config = layer, config
        d_model, d_ff, eps = config.d_model, config.d_ff, config.rms_eps
        d_q, d_kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.has_rope = layer not in config.nope_layers
        self.attn_norm = RMSNorm(d_model, eps)
        self.qkv = Linear(d_model, d_q + 2 * d_kv, config.attention_bias)  # the rows are q, then k, then v
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim, eps) if config.qk_norm else None for _ in range(2))
        self.attn_out = Linear(d_q, d_model, config.output_bias)
        self.mlp_norm = RMSNorm(d_model, eps)
        self.gate_up = Linear(d_model, 2 * d_ff, config.mlp_bias)  # the rows are gate, then up
        self.down = Linear(d_ff, d_model, config.mlp_bias)

    def forward(self, x, cos, sin, attend, kv_dtype, fused):  # x (T, C), overwritten -> (T, C)
        T, n_heads, n_kv_heads = x.shape[0], self.config.n_heads, self.config.n_kv_heads
        dtype = product_dtype(self.attn_norm.weight, T)
        heads = self.qkv(self.attn_norm(x, dtype)).view(T, -1, self.config.head_dim)  # (T, Hq + 2 Hk, D)
        heads = heads.transpose(0, 1).to(kv_dtype)  # (Hq + 2 Hk, T, D)
        qk, v = heads.split((n_heads + n_kv_heads, n_kv_heads))  # (Hq + Hk, T, D), (Hk, T, D)
        if self.q_norm is not None:
            q, k = qk.split((n_heads, n_kv_heads))  # (Hq, T, D), (Hk, T, D)
            qk = torch.cat((self.q_norm(q, kv_dtype), self.k_norm(k, kv_dtype)))  # (Hq + Hk, T, D)
        if fused:
            qk = fused.rotate(self.layer, qk, v)  # (Hq + Hk, T, D)
        elif self.has_rope:
            qk = rotate(qk, cos, sin)  # (Hq + Hk, T, D)
        q, k = qk.split((n_heads, n_kv_heads))  # (Hq, T, D), (Hk, T, D)
        out = attend(self.layer, q, k, v).transpose(0, 1).reshape(T, -1).to(dtype)  # (T, Hq * D)
        x = self.attn_out(out, x)  # (T, C)
        gate_up = self.gate_up(self.mlp_norm(x, dtype))  # (T, 2 I)
        if fused:
            return self.down(fused.multiply_gates(gate_up), x)  # (T, C)
        gate, up = gate_up.chunk(2, dim=-1)  # (T, I), (T, I)
        return self.down(F.silu(gate).mul_(up), x)  # (T, C)


class Linear(nn.Linear):
    """y = x W^T + b, added to the residual if one is given.

    Where x has a wider dtype than W (see `product_dtype`), W is converted for this product only.
    """

    def forward(self, x, residual=None):  # (T, n_in) -> (T, n_out); overwrites the residual (T, n_out)
        if residual is not None and self.bias is None and residual.dtype == self.weight.dtype:
            return residual.addmm_(x, self.weight.T)  # (T, n_out), a single launch
        bias = None if self.bias is None else self.bias.to(x.dtype)  # (n_out,)
        y = F.linear(x, self.weight.to(x.dtype), bias)  # (T, n_out)
        return y if residual is None else residual.add_(y)  # (T, n_out)


class RMSNorm(nn.RMSNorm):
    def forward(self, x, dtype):  # (..., C) -> (..., C) in dtype
        if x.is_cpu and x.shape[:-1] == (1,):
            return norm_one_row(x, self.weight, self.eps, dtype)  # (1, C)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(dtype)  # (..., C)


def rope_frequencies(config: LlamaConfig, device) -> tuple[torch.Tensor, float]:
    """Angles per position (D/2,) float32, and the scale of cos and sin, by Hugging Face's formulas."""
    D, theta = config.head_dim, config.rope_theta
    exponent = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D  # (D/2,)
    freq = 1.0 / theta**exponent  # (D/2,)
    scaling, scale = config.rope_scaling or {"rope_type": "default", "factor": 1.0}, 1.0
    keep = torch.zeros_like(freq)  # (D/2,): a share of each frequency is kept, and the rest divided by the factor
    if scaling["rope_type"] == "llama3":
        # The share depends on a frequency's turns over the original context: 0 for few, 1 for many, linear between.
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # (D/2,)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,)
    elif scaling["rope_type"] == "yarn":
        # The share is linear in the index of the frequency, from 1 at beta_fast turns to 0 at beta_slow turns.
        turns = [scaling["beta_fast"], scaling["beta_slow"]]
        original = scaling["original_max_position_embeddings"]
        low, high = (D * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        keep = 1 - ((exponent * D / 2 - low) / ((high - low) or 0.001)).clamp(0, 1)  # (D/2,)
        scale = scaling["attention_factor"]  # scales q and k, so attention logits by its square
    return keep * freq + (1 - keep) * freq / scaling["factor"], scale  # (D/2,)


def rotate(x, cos, sin):
    """Apply RoPE in float32: x (heads, T, D), cos and sin (T, D), with the first half of sin negated -> x's shape."""
    halves_swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)  # (heads, T, D)
    return torch.addcmul(x * cos, halves_swapped, sin).to(x.dtype)  # (heads, T, D)


def causal_attention(layer, q, k, v):
    """Dense causal attention of the last T of T' tokens: q (Hq, T, D), k and v (Hk, T', D) -> (Hq, T, D).

    With T' = T it can be the `attend` of a prefill that keeps no cache. Memory grows with T', not with T * T'.
    """
    if q.is_cpu:
        return causal_attention_on_cpu(q, k, v)  # (Hq, T, D)
    T, past, group = q.shape[1], k.shape[1] - q.shape[1], len(q) // len(k)
    if q.dtype == torch.float32:  # no fused kernel shares float32 K and V in a group
        k, v, group = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), 1  # (Hq, T', D)
    mask = None
    if past and torch.version.hip:  # AMD's fused kernel would align the mask below at the upper left
        mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril(past)
    elif past:
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import, and CPUs do not need it

        mask = causal_lower_right(T, past + T)  # not materialised; it selects a fused kernel
    qkv = q[None], k[None], v[None]  # (1, Hq, T, D), (1, Hk, T', D), (1, Hk, T', D)
    return F.scaled_dot_product_attention(*qkv, mask, is_causal=not past, enable_gqa=group > 1)[0]  # (Hq, T, D)


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """A Hugging Face folder's tokenizer and its chat template. Text may use the ids below vocab_size only."""

    def __init__(self, folder: Path, vocab_size: int | None = None):
        path, template_path = folder / "tokenizer.json", folder / "chat_template.jinja"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            what = _file_problem(path, "is no fast tokenizer; use a model that has one")
            raise ModelError(f"{path} {what} ({_one_line(error)})")
        # The file keeps the state of a training: its length limit, its padding and its random splits.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if hasattr(self.tokenizer.model, "dropout"):
            self.tokenizer.model.dropout = None
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        self.vocab_size = vocab_size
        try:
            self.special_tokens = add_tokens(self.tokenizer, config, folder)  # {"bos_token": "<s>", ...}
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder}: a token in one of the tokenizer's files is malformed ({_one_line(error)})")
        template = template_path.read_text(encoding="utf-8") if template_path.is_file() else config.get("chat_template")
        self.chat_templates = template or ""  # one template, {name: template}, or [{"name": ..., "template": ...}, ...]
        self.has_chat_template = bool(template)
        self.mark = str(secrets.randbits(128))  # delimits control tokens; digits survive what templates do to text

    def encode(self, text: str, special_tokens: bool = True, control_tokens: bool = True) -> list[int]:
        """Token ids.

        special_tokens adds those of tokenizer.json's post-processor, but never a second BOS. Without control_tokens,
        `<|im_end|>` and its like in the text are text: use this for what a user or a document says.
        """
        tokenizer, bos = self.tokenizer, self.special_tokens.get("bos_token")
        if not control_tokens and self.control_pattern().search(text):
            tokenizer, bos = self.marked_tokenizer, None
        starts_with_bos = bos is not None and text.startswith(bos)
        return self._check(tokenizer.encode(text, add_special_tokens=special_tokens and not starts_with_bos).ids)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat_tokens(self, messages: list[dict], ids: list[int] = ()) -> list[int]:
        """The token ids of `chat(messages)`. Control tokens are those of the template; in a message they are text.

        After a conversation with the token ids `ids`, which end in the answer messages[-2]: only those that follow it.
        """
        written, mark = [], self.mark
        for message in messages:  # an answer may think: <think> has no special flag
            pattern = self.control_pattern(special_only=message.get("role") == "assistant")
            written.append(message | {"content": pattern.sub(rf"{mark}\g<0>{mark}", message["content"])})
        plain = written == messages
        if ids:
            written[-2] = written[-2] | {"content": mark[::-1]}  # other digits stand for the answer
        text, end = self.chat(written), None
        if ids:
            _, found, text = text.rpartition(mark[::-1])
            if not found:
                raise ModelError("the chat template leaves answers out; use one that shows them")
            ended = self.control_pattern().match(text.lstrip())
            if ended and self.tokenizer.token_to_id(ended[0]) == ids[-1]:  # the model has ended its turn already
                text, end = text.lstrip(), ids[-1]

        def swap(match):  # the marked tokenizer knows control tokens between marks only
            in_message, in_template = match.groups()
            return f"{mark}{in_template}{mark}" if in_template else in_message or ""

        tokenizer = self.tokenizer
        if not plain:
            control, tokenizer = self.control_pattern().pattern, self.marked_tokenizer
            text = re.sub(f"{mark}({control}){mark}|{mark}|({control})", swap, text)
        new = self._check(tokenizer.encode(text, add_special_tokens=False).ids)
        return new[1:] if new[:1] == [end] else new

    def chat(self, messages: list[dict]) -> str:
        """The chat template's text for messages [{"role": ..., "content": ...}, ...], up to the start of the answer.

        Templates come with the model, so they run in jinja2's sandbox. Raises ModelError if no template exists, or if
        it fails.
        """

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # jinja2's escapes HTML
            return json.dumps(
                value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
            )

        # {% generation %} ... {% endgeneration %} marks answers for training; rendering needs only its scope, a `with`.
        source = re.sub(r"({%[-+]?\s*(?:end)?)generation(\s*[-+]?%})", r"\1with\2", self._default_template())
        options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment = ImmutableSandboxedEnvironment(**options)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = tojson
        try:
            values = dict(messages=messages, add_generation_prompt=True, tools=None, documents=None)
            return environment.from_string(source).render(values | self.special_tokens)
        except Exception as error:  # a template is a program and can raise anything
            raise ModelError(f"the chat template fails: {_one_line(error)}")

    def _default_template(self):
        templates = self.chat_templates
        if not templates:
            raise ModelError("the model has no chat template; use a raw prompt")
        if isinstance(templates, list):
            entries = [entry if isinstance(entry, dict) else {} for entry in templates]
            templates = {str(entry.get("name", "without a name")): entry.get("template") for entry in entries}
        if isinstance(templates, dict):
            templates = templates.get("default", templates)
        if not isinstance(templates, str):
            raise ModelError(f"no default among the chat templates ({', '.join(templates)}); use a raw prompt")
        return templates

    def control_pattern(self, special_only=False) -> re.Pattern:
        """Matches special tokens, and other added tokens that the chat template writes, such as <tool_call>."""
        added, template = self.tokenizer.get_added_tokens_decoder().values(), str(self.chat_templates)
        in_template = [t for t in added if not special_only and t.content.strip() and t.content in template]
        control = {token.content for token in [*in_template, *(token for token in added if token.special)]}
        return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")  # (?!): nothing

    @cached_property
    def marked_tokenizer(self):
        """The tokenizer with control tokens renamed to ones between marks, which no text of a user contains."""

        def rename(token):
            return f"{self.mark}{token}{self.mark}" if control.fullmatch(token or "") else token

        control, state = self.control_pattern(), json.loads(self.tokenizer.to_str())
        for token in state["added_tokens"]:
            if control.fullmatch(token["content"]):  # found wherever it is written, or the marks would become text
                token |= {"content": rename(token["content"]), "normalized": False, "single_word": False}
        model = state["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {rename(token): i for token, i in vocab.items()}
        else:  # of a unigram model
            model["vocab"] = [[rename(token), score] for token, score in vocab]
        if "unk_token" in model:
            model["unk_token"] = rename(model["unk_token"])
        if "merges" in model:  # without those that make a control token of text
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            model["merges"] = [pair for pair in pairs if not any(map(control.fullmatch, (*pair, "".join(pair))))]
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    def _check(self, ids):
        largest = max(ids, default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            token = self.tokenizer.id_to_token(largest)
            raise ModelError(
                f"the text has the token {token!r}, number {largest}, but the model only {self.vocab_size}"
            )
        return ids


def add_tokens(tokenizer, config, folder) -> dict[str, str]:
    """Add the tokens that other files than tokenizer.json define, with their flags, as transformers does.

    Returns the named special tokens, {"bos_token": "<s>", ...}. Raises ModelError where a token cannot get its id.
    """
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    legacy, fields, declared = "added_tokens_decoder" not in config, dict(config), config.get("added_tokens_decoder")
    if legacy:  # then tokenizer.json knows the flags best
        fields |= _read_json(folder / "special_tokens_map.json", optional=True)
        declared = {i: token for token, i in _read_json(folder / "added_tokens.json", optional=True).items()}
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    fields |= extra if isinstance(extra, dict) else fields.get("model_specific_special_tokens") or {}
    content = {key: value.get("content") if isinstance(value, dict) else value for key, value in fields.items()}
    names = {k: value for k, value in content.items() if k.endswith("_token") and value and isinstance(value, str)}
    special = [*(fields[key] for key in names), *(extra if isinstance(extra, list) else [])]

    def make(value, **flags):  # value: text, or a dict of the text and its flags
        flags |= value if isinstance(value, dict) else {"content": value}
        return tokenizers.AddedToken(**{k: v for k, v in flags.items() if k != "__type"})

    special = {token.content: token for token in (make(value, special=True, normalized=False) for value in special)}
    ids, new = {}, {}
    for i, value in sorted((declared or {}).items(), key=lambda item: int(item[0])):
        text = value["content"] if isinstance(value, dict) else value
        token = make(value, special=text in special, normalized=text not in special)
        ids[token.content] = int(i)
        if not (legacy and token.content in known):
            new[token.content] = token
    new |= {text: token for text, token in special.items() if text not in known and text not in new}
    for text in names.values():  # a named token is special, whatever its flag says
        token = new.get(text) or known[text]
        if not token.special:
            flags = dict(lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word)
            new[text] = tokenizers.AddedToken(text, special=True, normalized=token.normalized, **flags)
    tokenizer.add_tokens(list(new.values()))
    for text, i in ids.items():
        if tokenizer.token_to_id(text) != i:
            raise ModelError(
                f"{folder}: tokenizer.json lacks the token {text!r}, to which another file gives the id {i}"
            )
    return names


codecs.register_error("replace each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class TextStream:
    """Turns a sequence of token ids into text, token by token. Only whole characters are returned, each once.

    The joined pieces equal `decode` of all tokens, except that some decoders, those with tokens for bytes such as
    <0xE6>, take whole characters back where a stray byte follows. Here characters stay, and the byte becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer.tokenizer, [], ""
        self.stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace each byte")
        self.newline = self.tokenizer.token_to_id("<0x0A>")
        has_bytes = self.newline is not None and self.tokenizer.decode([self.newline]) == "\n"
        self.bytes = {self.tokenizer.token_to_id(f"<0x{i:02X}>"): bytes([i]) for i in range(256) if has_bytes}

    def push(self, token_id: int) -> str:
        """The characters that this token completes. The bytes of an incomplete character are kept for later tokens."""
        if self.bytes:
            text = self._push_beside_bytes(token_id)
        else:
            self.ids.append(token_id)
            text = self.stream.step(self.tokenizer, token_id) or ""
        self.shown += text
        return text

    def _push_beside_bytes(self, token_id):
        first = not self.ids  # decoders drop a space at the start of a text
        if token_id in self.bytes:
            text = self.utf8.decode(self.bytes[token_id])
            if first and text == " ":
                text = self.tokenizer.decode([token_id])
        else:
            text = self.tokenizer.decode([self.newline, token_id])[1:]
            if not text:
                return ""  # a special token does not part the bytes of a character
            text = self.utf8.decode(b"", final=True) + (self.tokenizer.decode([token_id]) if first else text)
        self.ids.append(token_id)
        return text

    def flush(self) -> str:
        """The rest of the text: U+FFFD for a character that is still incomplete."""
        if self.bytes:
            return self.utf8.decode(b"", final=True)
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.shown) :]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


class ModelError(Exception):
    """A model folder, checkpoint or tokenizer that cannot be used; one line says what is wrong and what to use."""


def load_model(name_or_path: str, dtype: torch.dtype, device: str) -> tuple[Llama, Tokenizer]:
    """Load a Hugging Face folder, or the hub's repository of that id: (model, tokenizer). Raises ModelError."""
    folder = _find_folder(str(name_or_path))
    raw, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json", optional=True)
    if generation.get("eos_token_id") is not None:  # it can name more stop tokens than config.json
        raw["eos_token_id"] = generation["eos_token_id"]
    config = LlamaConfig.from_json(raw)
    tokenizer = Tokenizer(folder, config.vocab_size)
    n_tokens = tokenizer.tokenizer.get_vocab_size(with_added_tokens=False)
    if n_tokens > config.vocab_size:
        raise ModelError(f"{folder}: the tokenizer has {n_tokens} tokens, the model only {config.vocab_size}")
    eos = tokenizer.tokenizer.token_to_id(tokenizer.special_tokens.get("eos_token", ""))
    if eos is not None and eos not in config.eos_token_ids:
        config = dataclasses.replace(config, eos_token_ids=(*config.eos_token_ids, eos))

    tensors = _find_tensors(folder)
    if config.tie_embeddings and HEAD in tensors:
        if EMBED not in tensors or _equal(tensors[EMBED], tensors[HEAD]):
            tensors[EMBED] = tensors.pop(HEAD)
        else:
            config = dataclasses.replace(config, tie_embeddings=False)
    model = Llama(config, dtype, device)
    _fill(model, tensors, folder)
    return model.eval(), tokenizer


def _find_folder(name_or_path):
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ModelError(f"{folder} {_file_problem(folder, 'is a file; use the folder of a Hugging Face model')}")
    files = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    files += ["special_tokens_map.json", "added_tokens.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=files))
    except Exception as error:  # network, hub, disk and naming errors share no base class
        raise ModelError(f"{name_or_path}: neither a folder, nor fetched from the hub ({_one_line(error)})")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# The parts of a block -> Hugging Face's names, in the order in which their rows are stacked.
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "attn_out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": "mlp.gate_proj mlp.up_proj",
    "down": "mlp.down_proj",
}


def checkpoint_targets(model):
    """{Hugging Face's name of a tensor: the slice of a parameter that it fills}. Of 4-bit weights: a widened copy."""
    c = model.config
    d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    targets = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm.weight}
    if not c.tie_embeddings:
        targets["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        for part, kind in itertools.product(HF_NAMES, ("weight", "bias")):
            parameter, names = getattr(getattr(block, part), kind, None), HF_NAMES[part].split()
            if parameter is not None:
                rows = (d_q, d_kv, d_kv) if part == "qkv" else len(parameter) // len(names)
                slices = zip(names, parameter.split(rows))
                targets |= {f"model.layers.{i}.{name}.{kind}": target for name, target in slices}
    return targets


# What training tools put around the modules whose tensors they save; "model." is optional for the same reason.
WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
QUANTISED = re.compile(r"\.(qweight|qzeros|scales|biases|g_idx|absmax|quant_map|SCB|weight_\w+|\w+_scale\w*)$")


def _find_tensors(folder):
    """{Hugging Face's name of a tensor: (open file, its name there)}; the files are memory-mapped."""
    tensors = {}
    for path in _checkpoint_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            what = _file_problem(path, "is damaged; fetch it again")
            raise ModelError(f"{path} {what} ({_one_line(error)})")
        for key in file.keys():
            name = re.sub(r"^(model\.)*", "", WRAPPERS.sub("", key))
            name = name if name == HEAD else f"model.{name}"
            if ".rotary_emb." in name:
                continue  # old checkpoints have these redundant tensors
            if QUANTISED.search(name):
                raise ModelError(f"{path}: {key} belongs to a quantised checkpoint, which is not supported; {REMEDY}")
            if not _equal(tensors.setdefault(name, (file, key)), (file, key)):
                raise ModelError(f"{path}: the checkpoint has {name} twice, with different values")
    return tensors


def _equal(one, other):
    """Whether two tensors, given as (file, name), are one and the same, or have equal values."""
    if one == other:
        return True
    a, b = (file.get_tensor(key).float() for file, key in (one, other))
    return torch.equal(a, b)


def _fill(model, tensors, folder):
    """Copy the checkpoint into the model's parameters, one tensor at a time. Raises ModelError."""
    targets = checkpoint_targets(model)
    for name in keep_four_bits(model, tensors, targets):
        del targets[name], tensors[name]
    for name, (file, key) in tensors.items():
        if name not in targets:
            raise ModelError(f"{folder}: the tensor {key} is not one that config.json calls for")
        source, target = file.get_tensor(key), targets.pop(name)
        if source.dtype == torch.uint8 and source.dim() == 3 and source.shape[-1] in BLOCK_BYTES:
            source = widen(source)  # (n_out, n_in)
        if source.shape != target.shape or source.dtype not in FLOATS:
            found, wanted = f"{source.dtype} {tuple(source.shape)}", tuple(target.shape)
            raise ModelError(f"{folder}: {key} is {found}; config.json calls for unquantised floats of shape {wanted}")
        target.copy_(source)  # target's shape
    if targets:
        raise ModelError(f"{folder}: the checkpoint lacks {len(targets)} tensors, {min(targets)} among them")


FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def _checkpoint_files(folder):
    """model.safetensors, or else the shards named in its index. Names with a folder are refused."""
    whole, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index_path.is_file():
        others = sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(pattern))
        found = f", but {others[0].name}, which {_file_problem(others[0], 'has another format')}" if others else ""
        adapter = ", but a LoRA adapter; merge it into its model" if (folder / "adapter_config.json").is_file() else ""
        raise ModelError(f"{folder} has no model.safetensors{found or adapter or '; fetch the model again'}")
    names = _read_json(index_path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index_path}: no weight_map from tensor names to file names")
    for name in names.values():
        if name != Path(name).name:
            raise ModelError(f"{index_path}: {name!r} lies outside the model's folder")
    return [folder / name for name in sorted(set(names.values()))]


PICKLED = "holds pickled weights, which could run code; use the same model's safetensors, or convert it"
FIRST_BYTES = {  # {how a file begins: what it is}
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull`",
    b"GGUF": "is a GGUF file, which is not supported; use the model's Hugging Face folder",
    b"PK": PICKLED,
    b"\x80": PICKLED,
    b"<": "is a web page, not the file itself; fetch it again",
}


def _file_problem(path, otherwise):
    """What is wrong with a file that cannot be used, and what to do."""
    if not path.is_file():
        return "is missing; fetch it again"
    with path.open("rb") as file:
        beginning = file.read(32)
    return next((what for magic, what in FIRST_BYTES.items() if beginning.startswith(magic)), otherwise)


def _read_json(path, optional=False):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelError(f"{path} is missing; a Hugging Face folder has one")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} {_file_problem(path, 'is not readable JSON')}: {_one_line(error)}")
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; it must hold a JSON object")
    return content


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def not_finite(dtype: torch.dtype) -> ModelError:
    """The error for logits that are NaN or infinite."""
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(dtype)
    remedy = f"try --dtype {wider}" if wider else "its weights are damaged, fetch them again"
    return ModelError(f"the model's logits are not finite in {str(dtype).removeprefix('torch.')}: {remedy}")


# ---------------------------------------------------------------------------------------------------------------------
# config.json


# {model_type: the values of keys that config.json may leave out}
FAMILIES = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "smollm3": {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6}
    | {"tie_word_embeddings": True},
}
REMEDY = "use a dense Llama, Mistral, Qwen2, Qwen3 or SmolLM3, not quantised, that attends to its whole context"

# {RoPE type: Hugging Face's keys for its parameters, except rope_theta}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}


def _refuse(condition, message):
    if condition:
        raise ModelError(f"config.json: {message}")


def _read_config(raw):
    family = raw.get("model_type")
    _refuse(family not in FAMILIES, f"model_type {family!r} is not supported; {REMEDY}")
    raw = FAMILIES[family] | raw
    n_layers, act, eos = int(raw["num_hidden_layers"]), raw.get("hidden_act", "silu"), raw.get("eos_token_id")
    theta, scaling, context_len = _rope_parameters(raw)
    quantised = raw.get("quantization_config") or {}
    window, other_layers = _find_window(raw, family, n_layers), {*(raw.get("layer_types") or ())}
    unsupported = {
        "a quantised checkpoint": quantised.get("quant_method") != "q4_1" and (quantised or raw.get("quantization")),
        f"a sliding window of {window} tokens": window < context_len,
        "attention of another kind": other_layers - {"full_attention", "sliding_attention"},
        f"hidden_act {act!r}": act != "silu",
    }
    for what, found in unsupported.items():
        _refuse(found, f"{what} is not supported; {REMEDY}")

    uses_rope = [True] * n_layers
    if family == "smollm3":  # 1: the layer has RoPE
        interval = raw.get("no_rope_layer_interval", 4)
        uses_rope = raw.get("no_rope_layers") or [(layer + 1) % interval for layer in range(n_layers)]
    attention_bias = bool(raw.get("attention_bias", False))
    config = LlamaConfig(
        n_layers=n_layers,
        n_heads=int(raw["num_attention_heads"]),
        n_kv_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
        head_dim=int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]),
        d_model=int(raw["hidden_size"]),
        d_ff=int(raw["intermediate_size"]),
        vocab_size=int(raw["vocab_size"]),
        context_len=context_len,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=attention_bias or family == "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        eos_token_ids=tuple(int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None),
        output_bias=attention_bias and family != "qwen2",
        qk_norm=family == "qwen3",
        nope_layers=tuple(layer for layer in range(n_layers) if not uses_rope[layer]),
    )
    for name, value in (vars(config) | (scaling or {})).items():
        _refuse(type(value) in (int, float) and not value > 0, f"{name} is {value}; it must be positive")
    heads, kv_heads = config.n_heads, config.n_kv_heads
    _refuse(heads % kv_heads, f"{heads} heads do not divide into {kv_heads} KV heads")
    _refuse(config.head_dim % 2, f"head_dim is {config.head_dim}; RoPE needs an even one")
    return config


def _find_window(raw, family, n_layers):
    """The number of last tokens to which some layer is limited, or infinity."""
    layers, window = raw.get("layer_types"), raw.get("sliding_window")
    if family == "mistral":
        used = True
    elif layers:
        used = "sliding_attention" in layers
        window = window or 0  # the layers have a window of unknown size
    else:
        used = raw.get("use_sliding_window") and (family == "smollm3" or raw.get("max_window_layers", 28) < n_layers)
    return math.inf if not used or window is None else window


def _rope_parameters(raw):
    """(theta, scaling, context length), where scaling is None, or {"rope_type": ...} and the keys of ROPE_KEYS."""
    # transformers 5 writes rope_parameters; 4 writes rope_theta and rope_scaling, and 'type' before 'rope_type'.
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):  # an entry for each type of layers
        _refuse("full_attention" not in given, "the RoPE parameters have no entry for full_attention")
        given = given["full_attention"] or {}
    length = raw["max_position_embeddings"]
    rope = {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": length}
    outside = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    for source in outside, given, {key: raw.get(key) for key in ("original_max_position_embeddings",)}:
        rope |= {key: value for key, value in source.items() if value is not None}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _refuse(rope_type not in ROPE_KEYS, f"rope type {rope_type!r} is not supported; use one of {', '.join(ROPE_KEYS)}")
    unusual = rope.get("partial_rotary_factor", 1) != 1 or not rope.get("truncate", True)
    _refuse(unusual, f"RoPE with partial_rotary_factor or truncate false is not supported; {REMEDY}")
    original, context_len = rope["original_max_position_embeddings"], int(length)
    if rope_type == "yarn":
        rope.setdefault("factor", length / original)
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        growth = math.log(max(rope["factor"], 1.0))
        ratio = (0.1 * mscale * growth + 1) / (0.1 * all_dim * growth + 1) if mscale and all_dim else 0.1 * growth + 1
        rope.setdefault("attention_factor", ratio)
    if rope_type in ("linear", "yarn"):  # max_position_embeddings may be the length before the extension
        context_len = max(context_len, int(rope["factor"] * original))
    scaling = {"rope_type": rope_type} | {key: float(rope[key]) for key in ROPE_KEYS[rope_type]}
    return float(rope["rope_theta"]), None if rope_type == "default" else scaling, context_len


# ---------------------------------------------------------------------------------------------------------------------
# Shortcuts for CPUs: the dtypes that a CPU multiplies quickly, 4-bit weights, single rows, and attention


def product_dtype(weight, n_rows) -> torch.dtype:
    """The dtype in which n_rows are multiplied by a weight: the weight's, or float32 if a CPU is slow in the weight's.

    The time of one row, a decode step, is that of reading the weight, so it is multiplied in the weight's dtype.
    """
    if weight.is_cpu and n_rows > 1 and not multiplies(weight.dtype):
        return torch.float32
    return weight.dtype


@cache
def multiplies(dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype faster than float32's: among x86's, those with AMX tiles."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name and platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported():
        return False
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)  # None: PyTorch without oneDNN
    return name is None or (supported is not None and supported())


def activation_dtypes(dtype, device):
    """The dtypes of the residual stream, and of q, k and v, for weights of a dtype. Float32 rounds less."""
    if torch.device(device).type != "cpu":
        return dtype, dtype
    # A residual of float32 costs a CPU no time. A cache of bfloat16 is read in half the time on any CPU.
    return torch.float32, dtype if dtype == torch.bfloat16 or multiplies(dtype) else torch.float32


def fastest_backend(n_rows, device):
    """A context for n_rows: oneDNN takes twice as long as PyTorch to multiply one row of bfloat16 on a CPU."""
    one_row = n_rows == 1 and device.type == "cpu"
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if one_row else nullcontext()


BLOCK_BYTES = (20, 34)  # of 32 weights in 4 bits, in 8 bits


def widen(blocks):
    """The weights (n_out, n_in) float32 of blocks of 32, uint8: (n_out, n_in/32, 20) or (n_out, n_in/32, 34).

    20 bytes: 32 levels of 4 bits, the first of two in the low half, then a scale and a minimum in float16; a weight is
    level * scale + minimum (llama.cpp's Q4_1). 34 bytes: a scale in float16, then 32 signed levels (its Q8_0).
    """
    if blocks.shape[-1] == 20:  # these are rows of PyTorch's quantised embeddings
        return torch.ops.quantized.embedding_bag_4bit_unpack(blocks.flatten(0, 1)).view(len(blocks), -1)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()  # (n_out, n_in/32, 1)
    return (blocks[..., 2:].view(torch.int8) * scale).flatten(1)  # (n_out, n_in)


class FourBitLinear(nn.Module):
    """A Linear whose weight stays in 4 bits: blocks (n_out, n_in/32, 20) as in `widen`.

    One row is multiplied by the levels, with scales rounded to bfloat16. Many rows are multiplied by the weight that is
    widened for this product only.
    """

    def __init__(self, blocks, bias):
        super().__init__()
        self.blocks, self.bias = blocks, bias
        scale, minimum = blocks[..., 16:].contiguous().view(torch.float16).float().unbind(-1)  # (n_out, n_in/32) each
        zero = minimum + 8 * scale  # the operation's weight is (level - 8) * scale + zero
        self.scales = torch.stack((scale.T, zero.T), -1).bfloat16()  # (n_in/32, n_out, 2)
        pairs = blocks[..., :16].flatten(1)  # (n_out, n_in/2)
        levels = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1).int()  # (n_out, n_in)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)  # (n_out, n_in/2)

    @property
    def weight(self):
        return widen(self.blocks).to(torch.bfloat16)  # (n_out, n_in)

    def forward(self, x, residual=None):  # (T, n_in) -> (T, n_out); overwrites the residual (T, n_out)
        if len(x) == 1:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, 32, self.scales)  # (1, n_out)
        else:
            y = F.linear(x, widen(self.blocks).to(x.dtype))  # (T, n_out)
        if self.bias is not None:
            y += self.bias
        return y if residual is None else residual.add_(y)  # (T, n_out)


def multiplies_four_bits(dtype, device) -> bool:
    """Whether PyTorch has a fast product of bfloat16 activations and 4-bit weights on this device."""
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    has_operation = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return device.type == "cpu" and dtype == torch.bfloat16 and fast and has_operation


def keep_four_bits(model, tensors, targets) -> list[str]:
    """Put a FourBitLinear where the checkpoint has 4-bit weights only. Returns the names of its tensors."""
    kept = []
    if not multiplies_four_bits(model.dtype, model.device):
        return kept
    for i, block in enumerate(model.blocks):
        for part in ("qkv", "attn_out", "gate_up", "down"):
            linear = getattr(block, part)
            names = [f"model.layers.{i}.{name}.weight" for name in HF_NAMES[part].split()]
            shapes = [[len(targets[name]), linear.in_features // 32, 20] for name in names]
            slices = [file.get_slice(key) for file, key in (tensors[name] for name in names if name in tensors)]
            stored = [one.get_shape() for one in slices if one.get_dtype() == "U8"]
            if stored == shapes and linear.out_features % 16 == linear.in_features % 32 == 0:
                blocks = torch.cat([file.get_tensor(key) for file, key in (tensors[name] for name in names)])
                setattr(block, part, FourBitLinear(blocks, linear.bias))
                kept += names
    return kept


def norm_one_row(x, weight, eps, dtype):
    """RMSNorm of x (1, C) in dtype: four operations instead of nine, for 60 norms per token."""
    row = x.float()  # (1, C)
    mean_square = torch.addmm(row.new_full((1, 1), eps), row, row.mT, alpha=1 / row.numel())  # (1, 1)
    return (row * mean_square.rsqrt_()).to(dtype) * weight.to(dtype)  # (1, C)


def causal_attention_on_cpu(q, k, v):
    """causal_attention: float32 by PyTorch's fused kernel, other dtypes by plain matrix products."""
    if multiplies(q.dtype) and q.dtype != torch.float32:
        return causal_attention_in_tiles(q, k, v)  # (Hq, T, D)
    if q.dtype != torch.float32:
        return causal_attention_on_cpu(q.float(), k.float(), v.float()).to(q.dtype)  # (Hq, T, D)
    T, past, group = q.shape[1], k.shape[1] - q.shape[1], len(q) // len(k)
    # No CPU kernel has a mask for T < T': attend to the last T tokens, then to the earlier ones, and merge both.
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # returns the log-sum-exp too
    recent = (x[None, :, past:].repeat_interleave(group, 1) for x in (k, v))  # (1, Hq, T, D) each
    out, lse = attend(q[None], *recent, is_causal=True)  # (1, Hq, T, D), (1, Hq, T)
    if past == 0:
        return out[0]  # (Hq, T, D)
    shared = q.reshape(1, len(k), group * T, -1)  # the queries of a group see the same earlier keys
    old_out, old_lse = attend(shared, k[None, :, :past], v[None, :, :past])  # (1, Hk, G * T, D), (1, Hk, G * T)
    weight = torch.sigmoid(old_lse.reshape_as(lse) - lse)[..., None]  # (1, Hq, T, 1): the share of the earlier tokens
    return torch.lerp(out, old_out.reshape_as(out), weight)[0]  # (Hq, T, D)


TILE_LOGITS = 1 << 22  # 8 MB of logits fit a CPU's cache
TILE_KEYS = 512  # keys are rounded up to a multiple of this: oneDNN compiles and keeps a kernel for every shape


def causal_attention_in_tiles(q, k, v):
    """causal_attention by plain matrix products.

    A CPU with bfloat16 runs them several times as fast as PyTorch's fused kernel, which computes in float32. Logits are
    rounded to q's dtype.
    """
    T, total, group = q.shape[1], k.shape[1], len(q) // len(k)
    n_rows = min(T, max(16, TILE_LOGITS // (len(q) * total)))  # queries in a tile
    q = (q * q.shape[2] ** -0.5).unflatten(0, (-1, group))  # (Hk, G, T, D)
    out, start = torch.empty_like(q), total - T  # (Hk, G, T, D), the position of a tile's first query
    for rows, tile in zip(q.split(n_rows, 2), out.split(n_rows, 2)):  # (Hk, G, rows, D) each
        n = rows.shape[2]
        end = min(total, -(-(start + n) // TILE_KEYS) * TILE_KEYS)
        logits = rows.flatten(1, 2) @ k[:, :end].mT  # (Hk, G * rows, end)
        position = torch.arange(start, end)
        future = position > position[:n, None]  # (rows, end - start)
        logits.unflatten(1, (group, n))[..., start:].masked_fill_(future, -math.inf)
        tile.copy_((logits.softmax(-1) @ v[:, :end]).unflatten(1, (group, n)))  # (Hk, G, rows, D)
        start += n
    return out.flatten(0, 1)  # (Hq, T, D)
