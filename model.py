"""The Llama family in one file: configuration, modules, loading, tokenizer and chat template.

Read it top to bottom: LlamaConfig, the RoPE tables, Llama (a block is attention, then SwiGLU), Tokenizer, load_model.
The batch size is always 1, so no tensor has a batch dimension. In the shapes, T is the number of tokens passed in,
C = d_model, F = d_ff, D = head_dim, Hq = n_heads, Hk = n_kv_heads, V = vocab_size.

The model keeps no KV cache and does not know how attention is computed: `Llama.forward` is handed a callable,
attend(layer, q, k, v) -> out, with q and out (Hq, T, D), k and v (Hk, T, D), q and k already rotated.

Source: Touvron et al., LLaMA (arXiv 2302.13971), and Hugging Face's checkpoint layout and RoPE scalings.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

import huggingface_hub
import jinja2
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError, safe_open
from torch.nn.attention.bias import causal_lower_right


class ModelError(Exception):
    """A model folder, checkpoint or tokenizer of no use; the message is one line: what is wrong, what would do."""


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


# The RoPE types known, and Hugging Face's keys for the parameters of each beside rope_theta.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


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
    rope_scaling: dict | None  # None, or {"rope_type": ...} and the keys of ROPE_KEYS
    rms_eps: float
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    @property
    def group_size(self):
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_json(cls, raw: dict) -> "LlamaConfig":
        """From the contents of a Hugging Face config.json, of transformers 4 or 5. Raises ModelError."""
        architectures = raw.get("architectures") or ["LlamaForCausalLM"]
        if raw.get("model_type") != "llama" or "LlamaForCausalLM" not in architectures:
            found = f"model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')}"
            raise ModelError(f"config.json: {found} is not supported; a model of the Llama family would do")
        # transformers 5 writes rope_parameters; 4 writes rope_theta and rope_scaling, and 'type' before 'rope_type'.
        rope = {"rope_theta": raw.get("rope_theta")} | (raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_KEYS:
            raise ModelError(f"config.json: rope type {rope_type!r} is not supported; {', '.join(ROPE_KEYS)} are")
        try:
            scaling = {"rope_type": rope_type} | {key: float(rope[key]) for key in ROPE_KEYS[rope_type]}
            eos = raw.get("eos_token_id")
            config = cls(
                n_layers=int(raw["num_hidden_layers"]),
                n_heads=int(raw["num_attention_heads"]),
                n_kv_heads=int(raw.get("num_key_value_heads") or raw["num_attention_heads"]),
                head_dim=int(raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]),
                d_model=int(raw["hidden_size"]),
                d_ff=int(raw["intermediate_size"]),
                vocab_size=int(raw["vocab_size"]),
                context_len=int(raw["max_position_embeddings"]),
                rope_theta=float(rope["rope_theta"] or 10000.0),
                rope_scaling=None if rope_type == "default" else scaling,
                rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
                tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
                attention_bias=bool(raw.get("attention_bias", False)),
                mlp_bias=bool(raw.get("mlp_bias", False)),
                eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
            )
        except KeyError as error:
            raise ModelError(f"config.json: the key {error} is missing")
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"config.json: {error}")
        config._validate(raw)
        return config

    def _validate(self, raw):
        sizes = "n_layers n_heads n_kv_heads head_dim d_model d_ff vocab_size context_len"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ModelError(f"config.json: {name} is {getattr(self, name)}; it must be at least 1")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"config.json: {self.n_heads} heads do not divide into {self.n_kv_heads} KV heads")
        if self.head_dim % 2:
            raise ModelError(f"config.json: head_dim is {self.head_dim}; RoPE needs an even one")
        for key, supported in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0), ("quantization_config", None)):
            if raw.get(key, supported) != supported:
                raise ModelError(f"config.json: {key} {raw[key]!r} is not supported; only {supported!r} is")


# ---------------------------------------------------------------------------------------------------------------------
# The model


def rope_tables(config: LlamaConfig, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, each (context_len, D/2) float32; Hugging Face's formulas."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim  # (D/2,)
    freq = 1.0 / config.rope_theta**exponent  # (D/2,)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        freq = freq / scaling["factor"]  # (D/2,)
    elif scaling["rope_type"] == "llama3":
        # Turns made over the original context: few -> divide by factor, many -> keep, between -> interpolate.
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # (D/2,)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,)
        freq = (1 - keep) * freq / scaling["factor"] + keep * freq  # (D/2,)
    angles = torch.arange(config.context_len, dtype=torch.float32, device=device)[:, None] * freq  # (context_len, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """RoPE in float32: x (heads, T, D) by cos (T, D) and sin (T, D), the sine negated in its first half."""
    halves_swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)  # (heads, T, D)
    return torch.addcmul(x * cos, halves_swapped, sin).to(x.dtype)  # (heads, T, D)


flash_attention_on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the log-sum-exp too


def causal_attention(layer, q, k, v):
    """Dense causal attention of the last T of T' tokens: q (Hq, T, D), k and v (Hk, T', D) -> (Hq, T, D).

    With T' = T it is the `attend` of a prefill that keeps no cache. Memory grows with T', never with T * T'.
    """
    (n_heads, T, D), (n_kv_heads, total, _), group = q.shape, k.shape, len(q) // len(k)
    if q.is_cuda and q.dtype == torch.float32:  # PyTorch has no fused kernel that shares float32 K and V in a group
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))  # (Hq, T', D)
    if not q.is_cpu:
        mask = causal_lower_right(T, total)  # never materialised: it tells a fused kernel what to do
        return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=len(k) < n_heads)[0]
    if total == T:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    # PyTorch's CPU kernel has no such mask: attend to the earlier tokens and to the last T apart, then merge.
    past = total - T
    recent = (x[None, :, past:].repeat_interleave(group, 1) for x in (k, v))  # (1, Hq, T, D) each
    out, lse = flash_attention_on_cpu(q[None], *recent, is_causal=True)  # (1, Hq, T, D), (1, Hq, T)
    shared = q.reshape(1, n_kv_heads, group * T, D)  # a group's queries see the same earlier keys
    old_out, old_lse = flash_attention_on_cpu(shared, k[None, :, :past], v[None, :, :past])
    weight = torch.sigmoid(old_lse.reshape_as(lse) - lse)[..., None]  # (1, Hq, T, 1): the share of the earlier tokens
    return torch.lerp(out, old_out.reshape_as(out), weight.to(out.dtype))[0]


class Linear(nn.Linear):
    """y = x W^T + b. A wider x than W widens W, one matrix at a time: see `product_dtype`."""

    def forward(self, x):  # (T, n_in) -> (T, n_out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.RMSNorm):
    def forward(self, x, dtype):  # (T, C) -> (T, C) in dtype
        if x.is_cpu and len(x) == 1:  # four operations instead of nine: 60 norms a token
            row = x.float()  # (1, C)
            mean_square = torch.addmm(row.new_full((1, 1), self.eps), row, row.mT, alpha=1 / row.numel())  # (1, 1)
            return (row * mean_square.rsqrt_()).to(dtype) * self.weight.to(dtype)  # (1, C)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(dtype)


def product_dtype(weight, n_rows) -> torch.dtype:
    """The dtype in which n_rows are multiplied by a weight: its own, but float32 where a CPU is slow at it.

    One row, a decode step, waits for the weight's bytes and is multiplied in its dtype everywhere.
    """
    if weight.is_cpu and n_rows > 1 and not multiplies(weight.dtype):
        return torch.float32
    return weight.dtype


@cache
def multiplies(dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype natively: a narrow one is slower than float32 otherwise."""
    if dtype == torch.float32:
        return True
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    return getattr(torch.ops.mkldnn, name)()


@contextmanager
def fast_rows(one_row_on_cpu):
    """oneDNN multiplies one row by a bfloat16 matrix at half the speed of PyTorch's own code: turn it off for that."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(enabled and not one_row_on_cpu)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


class Block(nn.Module):
    """Attention, then SwiGLU; each normalises its input and adds its output to the residual stream."""

    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.config = layer, config
        c = config
        d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        self.attn_norm = RMSNorm(c.d_model, c.rms_eps)
        self.qkv = Linear(c.d_model, d_q + 2 * d_kv, c.attention_bias)  # rows: q, then k, then v
        self.attn_out = Linear(d_q, c.d_model, c.attention_bias)
        self.mlp_norm = RMSNorm(c.d_model, c.rms_eps)
        self.gate_up = Linear(c.d_model, 2 * c.d_ff, c.mlp_bias)  # rows: gate, then up
        self.down = Linear(c.d_ff, c.d_model, c.mlp_bias)

    def forward(self, x, cos, sin, attend, kv_dtype):
        T, n_heads, n_kv_heads = x.shape[0], self.config.n_heads, self.config.n_kv_heads
        dtype = product_dtype(self.qkv.weight, T)
        heads = (
            self.qkv(self.attn_norm(x, dtype)).view(T, -1, self.config.head_dim).transpose(0, 1)
        )  # (Hq + 2 Hk, T, D)
        heads = heads.to(kv_dtype)
        q, k = rotate(heads[:-n_kv_heads], cos, sin).split((n_heads, n_kv_heads))  # (Hq, T, D), (Hk, T, D)
        out = attend(self.layer, q, k, heads[-n_kv_heads:])  # (Hq, T, D)
        x = x + self.attn_out(out.transpose(0, 1).reshape(T, -1).to(dtype))  # (T, C)
        gate, up = self.gate_up(self.mlp_norm(x, dtype)).chunk(2, dim=-1)  # (T, F), (T, F)
        return x + self.down(F.silu(gate) * up)  # (T, C)


class Llama(nn.Module):
    """The parameters are left uninitialised: `load_model` fills them."""

    def __init__(self, config: LlamaConfig, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.config = config
        on_cpu = torch.device(device).type == "cpu"
        self.residual_dtype = torch.float32 if on_cpu else dtype  # costs a CPU nothing, and keeps more of the answer
        self.kv_dtype = torch.float32 if on_cpu and not multiplies(dtype) else dtype  # of q, k, v and so of a cache
        with torch.device("meta"):
            self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
            self.blocks = nn.ModuleList(Block(layer, config) for layer in range(config.n_layers))
            self.norm = RMSNorm(config.d_model, config.rms_eps)
            self.head = Linear(config.d_model, config.vocab_size, False)
        self.to_empty(device=device).to(dtype).requires_grad_(False)
        if config.tie_embeddings:
            self.head.weight = self.embed
        for name, table in zip(("cos", "sin"), rope_tables(config, device)):  # (context_len, D/2) float32
            self.register_buffer(name, table, persistent=False)

    @property
    def device(self):
        return self.embed.device

    @property
    def dtype(self):
        return self.embed.dtype

    @torch.inference_mode()
    def hidden(self, tokens, positions, attend):
        """tokens (T,) int64 at positions (T,) int64 -> the final, normed hidden states (T, C)."""
        x = F.embedding(tokens, self.embed).to(self.residual_dtype)  # (T, C)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D/2), (T, D/2)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (T, D), (T, D)
        for block in self.blocks:
            x = block(x, cos, sin, attend, self.kv_dtype)  # (T, C)
        return self.norm(x, product_dtype(self.head.weight, len(x)))  # (T, C)

    @torch.inference_mode()
    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32."""
        return self.head(hidden).float()  # (..., V)

    @torch.inference_mode()
    def forward(self, tokens, positions, attend):
        """tokens (T,) int64 at positions (T,) int64 -> the last position's logits (V,) float32."""
        with fast_rows(len(tokens) == 1 and self.embed.is_cpu):
            return self.logits(self.hidden(tokens, positions, attend)[-1:])[0]  # (V,)


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """A Hugging Face folder's tokenizer.json and its chat template."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path} is missing; a fast tokenizer in one tokenizer.json would do")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ModelError(f"{path} is not a tokenizer: {_one_line(error)}")
        config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_json(config_path) if config_path.is_file() else {}
        tokens = {key: value for key, value in config.items() if key.endswith("_token") and value}
        tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
        self.special_tokens = {key: value for key, value in tokens.items() if isinstance(value, str)}
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        self.chat_template = template_path.read_text(encoding="utf-8") if template_path.is_file() else template

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids; with special_tokens, those of tokenizer.json's post-processor too, but never a second BOS."""
        bos = self.special_tokens.get("bos_token")
        starts_with_bos = bos is not None and text.startswith(bos)
        return self.tokenizer.encode(text, add_special_tokens=special_tokens and not starts_with_bos).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def chat(self, messages: list[dict]) -> str:
        """The chat template's text for messages [{"role": ..., "content": ...}, ...], ending where the answer starts.

        Templates come with the model, so they run in jinja2's sandbox. Raises ModelError if there is none or it fails.
        """
        if not self.has_chat_template:
            raise ModelError("the model has no chat template; a raw prompt would do")

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except Exception as error:  # a template is a program: anything can happen in it
            raise ModelError(f"the chat template fails: {_one_line(error)}")


class TextStream:
    """Turns token ids into text as they come: whole characters only, nothing lost, nothing twice."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer.tokenizer, [], ""
        self.stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The characters that this token completes; a character's first bytes wait for the rest."""
        self.ids.append(token_id)
        text = self.stream.step(self.tokenizer, token_id) or ""
        self.shown += text
        return text

    def flush(self) -> str:
        """What still waits: U+FFFD for a character that was cut off."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.shown) :]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_model(name_or_path: str, dtype: torch.dtype, device: str) -> tuple[Llama, Tokenizer]:
    """A Hugging Face folder, or the id of one on the hub, as (model, tokenizer). Raises ModelError."""
    folder = _find_folder(str(name_or_path))
    raw, generation_path = _read_json(folder / "config.json"), folder / "generation_config.json"
    if generation_path.is_file():  # chat models end an answer with more tokens than config.json names
        raw["eos_token_id"] = _read_json(generation_path).get("eos_token_id", raw.get("eos_token_id"))
    config = LlamaConfig.from_json(raw)
    tokenizer = Tokenizer(folder)
    n_tokens = tokenizer.tokenizer.get_vocab_size(with_added_tokens=False)
    if n_tokens > config.vocab_size:
        raise ModelError(f"{folder}: the tokenizer has {n_tokens} tokens, the model only {config.vocab_size}")
    model = Llama(config, dtype, device)
    _fill(model, folder)
    return model.eval(), tokenizer


def _find_folder(name_or_path):
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if name_or_path.count("/") != 1 or name_or_path.startswith(("/", ".", "~")):
        raise ModelError(f"{name_or_path}: no such folder; a Hugging Face folder or a hub id (owner/name) would do")
    files = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=files))
    except Exception as error:  # network, hub, disk and naming errors share no base class
        raise ModelError(f"{name_or_path}: neither a folder nor fetched from the hub: {_one_line(error)}")


def checkpoint_targets(model):
    """Where each tensor of the checkpoint goes: its Hugging Face name -> the slice of a parameter that it fills."""
    c = model.config
    d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    targets = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm.weight}
    if not c.tie_embeddings:
        targets["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        prefix = f"model.layers.{i}."
        targets[prefix + "input_layernorm.weight"] = block.attn_norm.weight
        targets[prefix + "post_attention_layernorm.weight"] = block.mlp_norm.weight
        for linear, names, rows in (
            (block.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (d_q, d_kv, d_kv)),
            (block.attn_out, ("self_attn.o_proj",), (c.d_model,)),
            (block.gate_up, ("mlp.gate_proj", "mlp.up_proj"), (c.d_ff, c.d_ff)),
            (block.down, ("mlp.down_proj",), (c.d_model,)),
        ):
            for kind, parameter in linear.named_parameters():  # weight, and perhaps bias
                targets |= {f"{prefix}{name}.{kind}": part for name, part in zip(names, parameter.split(rows))}
    return targets


def _fill(model, folder):
    """Copies the checkpoint, memory-mapped, tensor by tensor into the model's parameters."""
    targets = checkpoint_targets(model)
    missing = set(targets)
    for path in _checkpoint_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and model.config.tie_embeddings
                    ):
                        continue  # old checkpoints carry them, though they follow from config.json and the embeddings
                    if name not in missing:
                        raise ModelError(f"{path}: the tensor {name} is not one that config.json calls for")
                    source, target = file.get_tensor(name), targets[name]
                    if source.shape != target.shape or not source.is_floating_point():
                        found, wanted = f"{source.dtype} {tuple(source.shape)}", tuple(target.shape)
                        raise ModelError(f"{path}: {name} is {found}; config.json calls for floats of shape {wanted}")
                    target.copy_(source)  # target's shape
                    missing.remove(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is missing or damaged; fetch it again ({_one_line(error)})")
    if missing:
        raise ModelError(f"{folder}: the checkpoint lacks {len(missing)} tensors, {min(missing)} among them")


def _checkpoint_files(folder):
    """model.safetensors, or the shards that its index names, none of which may lie outside the folder."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        return [folder / "model.safetensors"]
    names = _read_json(index_path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index_path}: no weight_map from tensor names to file names")
    root = folder.resolve()
    # The hub's cache is the one place where links lead out: snapshots/<revision>/<file> -> blobs/<hash>.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for name in set(names.values()):
        path = Path(name)
        resolved = (root / path).resolve()
        if path.is_absolute() or ".." in path.parts or not any(resolved.is_relative_to(r) for r in roots):
            raise ModelError(f"{index_path}: {name!r} lies outside the model's folder")
    return [folder / name for name in sorted(set(names.values()))]


def _read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; a Hugging Face folder has one")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON: {_one_line(error)}")
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; a JSON object would do")
    return content


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
