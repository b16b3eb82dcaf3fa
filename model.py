"""The Llama family in one file: the model, its tokenizer and chat template, and the loading of its checkpoints.

The batch size is always 1, so no tensor has a batch dimension. In the shapes, T is the number of tokens passed in,
C = d_model, I = d_ff, D = head_dim, Hq = n_heads, Hk = n_kv_heads, V = vocab_size.

The model keeps no KV cache and does not know how attention is computed: `Llama.forward` takes a callable
attend(layer, q, k, v) -> out, where q and out are (Hq, T, D), k and v are (Hk, T, D), and RoPE is applied to q and k.

Source: Touvron et al., LLaMA (arXiv 2302.13971); Peng et al., YaRN (arXiv 2309.00071); Hugging Face's checkpoint layout
and RoPE scalings.
"""

import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import cache, partial
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
        self.rope_by_matrix = torch.device(device).type != "cpu"  # for one token: saves launches on a GPU
        with torch.device("meta"):
            self.embed = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
            self.blocks = nn.ModuleList(Block(layer, config) for layer in range(config.n_layers))
            self.norm = RMSNorm(config.d_model, config.rms_eps)
            self.head = Linear(config.d_model, config.vocab_size, False)
        self.to(dtype).to_empty(device=device).requires_grad_(False)
        if config.tie_embeddings:
            self.head.weight = self.embed
        self.register_buffer("rope_table", compute_rope_table(config, device), persistent=False)

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
        cos, sin = self.rope_table[positions].unbind(1)  # (T, D/2), (T, D/2)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)  # (T, D), (T, D)
        rope = partial(rotate, cos=cos, sin=sin)
        if len(tokens) == 1 and self.rope_by_matrix:
            rope = partial(torch.matmul, other=rotation_matrix(cos, sin).to(self.kv_dtype))
        for block in self.blocks:
            x = block(x, rope, attend, self.kv_dtype)  # (T, C)
        return self.norm(x, product_dtype(self.head.weight, len(x)))  # (T, C)

    @torch.inference_mode()
    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32."""
        return self.head(hidden).float()  # (..., V)

    @torch.inference_mode()
    def forward(self, tokens, positions, attend):
        """tokens (T,) int64 at positions (T,) int64 -> the last position's logits (V,) float32."""
        with fastest_backend(len(tokens), self.device):
            return self.logits(self.hidden(tokens, positions, attend)[-1:])[0]  # (V,)


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

    def forward(self, x, rope, attend, kv_dtype):  # x (T, C), overwritten -> (T, C)
        T, n_heads, n_kv_heads = x.shape[0], self.config.n_heads, self.config.n_kv_heads
        dtype = product_dtype(self.qkv.weight, T)
        heads = self.qkv(self.attn_norm(x, dtype)).view(T, -1, self.config.head_dim)  # (T, Hq + 2 Hk, D)
        heads = heads.transpose(0, 1).to(kv_dtype)  # (Hq + 2 Hk, T, D)
        qk, v = heads.split((n_heads + n_kv_heads, n_kv_heads))  # (Hq + Hk, T, D), (Hk, T, D)
        if self.q_norm is not None:
            q, k = qk.split((n_heads, n_kv_heads))  # (Hq, T, D), (Hk, T, D)
            qk = torch.cat((self.q_norm(q, kv_dtype), self.k_norm(k, kv_dtype)))  # (Hq + Hk, T, D)
        if self.has_rope:
            qk = rope(qk)  # (Hq + Hk, T, D)
        q, k = qk.split((n_heads, n_kv_heads))  # (Hq, T, D), (Hk, T, D)
        out = attend(self.layer, q, k, v).transpose(0, 1).reshape(T, -1).to(dtype)  # (T, Hq * D)
        x = self.attn_out(out, x)  # (T, C)
        gate, up = self.gate_up(self.mlp_norm(x, dtype)).chunk(2, dim=-1)  # (T, I), (T, I)
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


def compute_rope_table(config: LlamaConfig, device) -> torch.Tensor:
    """cos and sin of the angles of all positions, (context_len, 2, D/2) float32, by Hugging Face's formulas."""
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
    freq = keep * freq + (1 - keep) * freq / scaling["factor"]  # (D/2,)
    angles = torch.arange(config.context_len, dtype=torch.float32, device=device)[:, None] * freq  # (context_len, D/2)
    return torch.stack((angles.cos(), angles.sin()), 1) * scale  # (context_len, 2, D/2)


def rotate(x, cos, sin):
    """Apply RoPE in float32: x (heads, T, D), cos and sin (T, D), with the first half of sin negated -> x's shape."""
    halves_swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)  # (heads, T, D)
    return torch.addcmul(x * cos, halves_swapped, sin).to(x.dtype)  # (heads, T, D)


def rotation_matrix(cos, sin):
    """The matrix (D, D) of one token's RoPE, from cos and sin (1, D): x @ matrix is one launch, `rotate` is four."""
    return cos[0].diag() + sin[0].diag().roll(cos.shape[1] // 2, 0)  # (D, D)


def causal_attention(layer, q, k, v):
    """Dense causal attention of the last T of T' tokens: q (Hq, T, D), k and v (Hk, T', D) -> (Hq, T, D).

    With T' = T it can be the `attend` of a prefill that keeps no cache. Memory grows with T', not with T * T'.
    """
    if q.is_cpu:
        return causal_attention_on_cpu(q, k, v)  # (Hq, T, D)
    T, past, group = q.shape[1], k.shape[1] - q.shape[1], len(q) // len(k)
    if q.dtype == torch.float32:  # no fused kernel shares float32 K and V in a group
        k, v, group = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0), 1  # (Hq, T', D)
    mask = causal_lower_right(T, past + T) if past else None  # not materialised; it selects a fused kernel
    qkv = q[None], k[None], v[None]  # (1, Hq, T, D), (1, Hk, T', D), (1, Hk, T', D)
    return F.scaled_dot_product_attention(*qkv, mask, is_causal=not past, enable_gqa=group > 1)[0]  # (Hq, T, D)


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """A Hugging Face folder's tokenizer.json and its chat template."""

    def __init__(self, folder: Path):
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ModelError(f"{path} is no fast tokenizer ({_one_line(error)}); use a model that has one")
        config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_json(config_path) if config_path.is_file() else {}
        tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
        tokens = {key: value for key, value in tokens.items() if key.endswith("_token") and value}
        self.special_tokens = {key: value for key, value in tokens.items() if isinstance(value, str)}
        template = config.get("chat_template")
        if isinstance(template, list):  # several templates, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        self.chat_template = template_path.read_text(encoding="utf-8") if template_path.is_file() else template
        self.has_chat_template = bool(self.chat_template)

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids. special_tokens adds those of tokenizer.json's post-processor, but never a second BOS."""
        bos = self.special_tokens.get("bos_token")
        starts_with_bos = bos is not None and text.startswith(bos)
        return self.tokenizer.encode(text, add_special_tokens=special_tokens and not starts_with_bos).ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def chat(self, messages: list[dict]) -> str:
        """The chat template's text for messages [{"role": ..., "content": ...}, ...], up to the start of the answer.

        Templates come with the model, so they run in jinja2's sandbox. Raises ModelError if no template exists, or if
        it fails.
        """
        if not self.has_chat_template:
            raise ModelError("the model has no chat template; use a raw prompt")

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        # {% generation %} ... {% endgeneration %} marks answers for training; rendering needs only its scope, a `with`.
        source = re.sub(r"({%[-+]?\s*(?:end)?)generation(\s*[-+]?%})", r"\1with\2", self.chat_template)
        options = dict(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment = ImmutableSandboxedEnvironment(**options)
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # the default escapes HTML
        try:
            values = dict(messages=messages, add_generation_prompt=True, tools=None, documents=None)
            return environment.from_string(source).render(values | self.special_tokens)
        except Exception as error:  # a template is a program and can raise anything
            raise ModelError(f"the chat template fails: {_one_line(error)}")


class TextStream:
    """Turns a sequence of token ids into text, token by token. Only whole characters are returned, each once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer.tokenizer, [], ""
        self.stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The characters that this token completes. The bytes of an incomplete character are kept for later tokens."""
        self.ids.append(token_id)
        text = self.stream.step(self.tokenizer, token_id) or ""
        self.shown += text
        return text

    def flush(self) -> str:
        """The rest of the text: U+FFFD for a character that is still incomplete."""
        return self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.shown) :]


# ---------------------------------------------------------------------------------------------------------------------
# Loading


class ModelError(Exception):
    """A model folder, checkpoint or tokenizer that cannot be used; one line says what is wrong and what to use."""


def load_model(name_or_path: str, dtype: torch.dtype, device: str) -> tuple[Llama, Tokenizer]:
    """Load a Hugging Face folder, or the hub's repository of that id: (model, tokenizer). Raises ModelError."""
    folder = _find_folder(str(name_or_path))
    raw, generation_path = _read_json(folder / "config.json"), folder / "generation_config.json"
    if generation_path.is_file():  # it can name more stop tokens than config.json
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
    files = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]
    files += ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name_or_path, allow_patterns=files))
    except Exception as error:  # network, hub, disk and naming errors share no base class
        raise ModelError(f"{name_or_path}: neither a folder, nor fetched from the hub ({_one_line(error)})")


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
    """{Hugging Face's name of a tensor: the slice of a parameter that it fills}."""
    c = model.config
    d_q, d_kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    targets = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm.weight}
    if not c.tie_embeddings:
        targets["lm_head.weight"] = model.head.weight
    for i, block in enumerate(model.blocks):
        for path, parameter in block.named_parameters():
            part, kind = path.split(".")  # kind: weight or bias
            names = HF_NAMES[part].split()
            rows = (d_q, d_kv, d_kv) if part == "qkv" else len(parameter) // len(names)
            slices = zip(names, parameter.split(rows))
            targets |= {f"model.layers.{i}.{name}.{kind}": target for name, target in slices}
    return targets


def _fill(model, folder):
    """Copy the memory-mapped checkpoint into the model's parameters, one tensor at a time. Raises ModelError."""
    targets, tied = checkpoint_targets(model), model.config.tie_embeddings
    missing = set(targets)
    for path in _checkpoint_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and tied):
                        continue  # old checkpoints have these redundant tensors
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
    """model.safetensors, or the shards named in its index. Names with a folder are refused."""
    index_path = folder / "model.safetensors.index.json"
    if not index_path.is_file():
        return [folder / "model.safetensors"]
    names = _read_json(index_path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index_path}: no weight_map from tensor names to file names")
    for name in names.values():
        if name != Path(name).name:
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
        raise ModelError(f"{path} holds a {type(content).__name__}; it must hold a JSON object")
    return content


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# config.json


FAMILIES = "llama", "mistral", "qwen2", "qwen3", "smollm3"  # values of model_type
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
    family, act, eos = raw.get("model_type"), raw.get("hidden_act", "silu"), raw.get("eos_token_id")
    window = raw.get("sliding_window", 4096) if family == "mistral" else raw.get("use_sliding_window")
    unsupported = {
        f"model_type {family!r}": family not in FAMILIES,
        "a quantised checkpoint": raw.get("quantization_config"),
        "a sliding window": window or "sliding_attention" in (raw.get("layer_types") or []),
        f"hidden_act {act!r}": act != "silu",
    }
    for what, found in unsupported.items():
        _refuse(found, f"{what} is not supported; {REMEDY}")

    theta, scaling = _rope_parameters(raw)
    n_layers, context_len = int(raw["num_hidden_layers"]), int(raw["max_position_embeddings"])
    if scaling and scaling["rope_type"] == "yarn":  # config.json may have the length before the extension
        context_len = max(context_len, int(scaling["factor"] * scaling["original_max_position_embeddings"]))
    uses_rope = raw["no_rope_layers"] if family == "smollm3" else [True] * n_layers  # 1: the layer has RoPE
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
        tie_embeddings=bool(raw.get("tie_word_embeddings", family == "smollm3")),
        attention_bias=attention_bias or family == "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
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


def _rope_parameters(raw):
    """(theta, scaling), where scaling is None, or {"rope_type": ...} and the keys of ROPE_KEYS."""
    # transformers 5 writes rope_parameters; 4 writes rope_theta and rope_scaling, and 'type' before 'rope_type'.
    given = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    given |= raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0}
    rope["original_max_position_embeddings"] = raw["max_position_embeddings"]
    rope |= {key: value for key, value in given.items() if value is not None}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    _refuse(rope_type not in ROPE_KEYS, f"rope type {rope_type!r} is not supported; use one of {', '.join(ROPE_KEYS)}")
    unusual = rope.get("partial_rotary_factor", 1) != 1 or rope.get("mscale") or not rope.get("truncate", True)
    _refuse(unusual, f"RoPE with partial_rotary_factor, mscale or truncate false is not supported; {REMEDY}")
    if rope_type == "yarn":
        rope.setdefault("attention_factor", 0.1 * math.log(max(rope["factor"], 1.0)) + 1.0)
    scaling = {"rope_type": rope_type} | {key: float(rope[key]) for key in ROPE_KEYS[rope_type]}
    return float(rope["rope_theta"]), None if rope_type == "default" else scaling


# ---------------------------------------------------------------------------------------------------------------------
# Shortcuts for CPUs: the dtypes that a CPU multiplies quickly, single rows, and attention


def product_dtype(weight, n_rows) -> torch.dtype:
    """The dtype in which n_rows are multiplied by a weight: the weight's, or float32 if a CPU is slow in the weight's.

    The time of one row, a decode step, is that of reading the weight, so it is multiplied in the weight's dtype.
    """
    if weight.is_cpu and n_rows > 1 and not multiplies(weight.dtype):
        return torch.float32
    return weight.dtype


@cache
def multiplies(dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype natively. If not, 16 bits are slower than float32."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)  # None: PyTorch without oneDNN
    return name is None or (supported is not None and supported())


def activation_dtypes(dtype, device):
    """The dtypes of the residual stream, and of q, k and v, for weights of a dtype. Float32 rounds less."""
    if torch.device(device).type != "cpu":
        return dtype, dtype
    return torch.float32, dtype if multiplies(dtype) else torch.float32  # a residual of float32 costs a CPU no time


def fastest_backend(n_rows, device):
    """A context for n_rows: oneDNN takes twice as long as PyTorch to multiply one row of bfloat16 on a CPU."""
    one_row = n_rows == 1 and device.type == "cpu"
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if one_row else nullcontext()


def norm_one_row(x, weight, eps, dtype):
    """RMSNorm of x (1, C) in dtype: four operations instead of nine, for 60 norms per token."""
    row = x.float()  # (1, C)
    mean_square = torch.addmm(row.new_full((1, 1), eps), row, row.mT, alpha=1 / row.numel())  # (1, 1)
    return (row * mean_square.rsqrt_()).to(dtype) * weight.to(dtype)  # (1, C)


def causal_attention_on_cpu(q, k, v):
    """causal_attention: float32 by PyTorch's fused kernel, other dtypes by plain matrix products."""
    if q.dtype != torch.float32:
        return causal_attention_in_tiles(q, k, v)  # (Hq, T, D)
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
