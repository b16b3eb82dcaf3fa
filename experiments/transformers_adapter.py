"""The method inside Hugging Face's transformers: for models that model.py does not load, on one device or several.

    model = AutoModelForCausalLM.from_pretrained(name)
    attach(model, budget=1024)
    model.generate(**inputs)

Reading order: `attach`, `attention` (what transformers calls), `SparseCache` (a text and its decoder). The model's code
runs as it is: it hands q, k and v of a layer to `attention`, which hands them to a `SparseDecoder`. Prompts are read
with dense attention. Under torchrun, with DistributedConfig(tp_size=N), each process has its share of the heads, and
all heads of all processes compete for the budget (`choose_together`).
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
import types
from functools import partial
from types import SimpleNamespace

import safetensors.torch
import torch
import torch.distributed
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation.configuration_utils import GenerationMode

import kernels
from attnpred import DEFAULT_PREDICTOR, Config, InputError, SparseDecoder, has_streams, load_predictor, require
from model import causal_attention, widen

# Keyword arguments of attention functions that change what is attended to
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


def readable(folder: pathlib.Path) -> pathlib.Path:
    """A folder that transformers can read. The default model's 4-bit weights are widened to bfloat16 in a copy beside
    it, which is made once.
    """
    config = json.loads((folder / "config.json").read_text())
    copy = folder.with_name(f"{folder.name}-bfloat16")
    if not config.pop("quantization_config", None):
        return folder
    if not copy.is_dir():
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        with tempfile.TemporaryDirectory(dir=folder.parent) as making:
            part = pathlib.Path(making) / copy.name
            shutil.copytree(folder, part, ignore=shutil.ignore_patterns("model.safetensors"))
            (part / "config.json").write_text(json.dumps(config))
            widened = {name: widen(x) if x.dtype == torch.uint8 else x for name, x in tensors.items()}
            widened = {name: x.bfloat16() for name, x in widened.items()}
            safetensors.torch.save_file(widened, part / "model.safetensors", metadata={"format": "pt"})
            with contextlib.suppress(OSError):  # another process was faster
                part.rename(copy)
    return copy


def attach(model, predictor=None, backend="auto", make_decoder=SparseDecoder, **options):
    """Let a decoder-only model of transformers decode with the method, until `detach(model)`. Raises InputError.

    options: fields of attnpred.Config; predictor: one from `load_predictor`, by default the bundled one; backend:
    torch, triton or auto; make_decoder: what makes a SparseDecoder for each text.
    """
    detach(model)
    if backend == "auto":
        backend = "triton" if has_streams(model.device) else "torch"
    try:
        config = Config(**options)
        kernels.use_triton(backend, model.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"attach: {error}") from None
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    name = type(model).__name__
    require(not kinds, f"{name} has layers of {', '.join(sorted(kinds))}: only full attention is supported")
    require(not model.config.is_encoder_decoder, f"{name} has an encoder: only decoder-only models are supported")
    require(model._can_set_attn_implementation(), f"{name} does not call transformers' attention functions")
    size, kv_heads = model._tp_size or 1, getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    require(kv_heads % size == 0, f"{size} processes cannot share {kv_heads} KV heads: use a tp_size that divides them")
    state = SimpleNamespace(config=config, backend=backend, make_decoder=make_decoder, n_layers=text.num_hidden_layers)
    state.predictor = predictor or load_predictor(DEFAULT_PREDICTOR)
    state.group = model._device_mesh["tp"].get_group() if size > 1 else None
    state.cache, state.before = (
        None,
        model.config._attn_implementation,
    )  # the running text's, and what `detach` restores
    for module in model.modules():
        module.attnpred = state  # `attention` is handed a module
    before, after = partial(model.register_forward_pre_hook, with_kwargs=True), model.register_forward_hook
    state.hooks = before(begin_forward), after(end_forward)
    model._prepare_cache_for_generation = types.MethodType(prepare_cache, model)
    model.set_attn_implementation("attnpred")


def detach(model):
    """Undo `attach`."""
    if state := vars(model).get("attnpred"):
        for hook in state.hooks:
            hook.remove()
        del model._prepare_cache_for_generation
        for module in model.modules():
            del module.attnpred
        model.set_attn_implementation(state.before)


def prepare_cache(model, config, model_kwargs, mode, batch_size, max_cache_length):
    """What `generate` calls before the model runs, in place of the model's method. Raises InputError."""
    known = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    require(known, f"{mode.value} is not supported: decode greedily or sample")
    require(batch_size == 1 and config.num_return_sequences == 1, "one sequence at a time: give a batch of 1")
    require(not config.output_attentions, "output_attentions is not supported: no step computes all of them")
    require(config.use_cache, "use_cache=False is not supported: detach the model first")
    kind = config.cache_implementation
    require(kind is None, f"cache_implementation={kind!r} is not supported: leave it out")
    require(model_kwargs.get("attention_mask") is None, "padding is not supported: give the tokens alone")
    cache = model_kwargs.get("cache")
    if cache is None:
        cache = SparseCache(model, max_cache_length)
    kind = type(cache).__name__
    require(isinstance(cache, SparseCache), f"a {kind} is not supported: leave it out or give a SparseCache")
    cache.check_usable()
    cache.prompt_end = getattr(config, "_mask_length", 0)  # the text to be read, also where it comes in chunks
    model_kwargs["cache"] = cache


def begin_forward(model, args, kwargs):
    """Before the model runs: its attention functions are not handed the token ids."""
    cache, state = kwargs.get("cache"), model.attnpred
    state.cache = cache if isinstance(cache, SparseCache) else None
    if state.cache:
        mask = kwargs.get("attention_mask")
        require(mask is None or mask.dim() > 2 or mask.all(), "padding is not supported: give the tokens alone")
        cache.begin_forward(args[0] if args else kwargs.get("input_ids"))


def end_forward(model, args, output):
    if model.attnpred.cache:
        model.attnpred.cache.end_forward()
        model.attnpred.cache = None


def attention(module, q, k, v, mask, scaling=None, dropout=0.0, **options):
    """What transformers calls: q (1, Hq, T, D), k and v (1, Hk, T, D) -> (1, T, Hq, D), and no weights.

    Without a SparseCache it is dense attention, to k and v of all tokens.
    """
    found = [name for name in UNSUPPORTED if options.get(name) is not None]
    require(not found, f"{type(module).__name__} has {', '.join(found)}: only plain attention is supported")
    causal = options.get("is_causal")
    require(getattr(module, "is_causal", True) if causal is None else causal, "only causal attention is supported")
    require(len(q) == 1, "one sequence at a time: give a batch of 1")
    require(mask is None, "an attention mask of your own is not supported: leave it out")
    require(not dropout, "dropout is not supported: call model.eval()")
    require(k.shape[-1] == v.shape[-1], "keys and values of different sizes are not supported")
    scale = 1.0 if scaling is None else scaling * q.shape[-1] ** 0.5  # what follows scales by 1 / sqrt(D)
    q = q[0] if abs(scale - 1) < 1e-6 else q[0] * scale  # (Hq, T, D)
    attend = module.attnpred.cache.attend if module.attnpred.cache else causal_attention
    return attend(module.layer_idx, q, k[0], v[0]).transpose(0, 1)[None], None


AttentionInterface.register("attnpred", attention)


Shape = dataclasses.make_dataclass("Shape", ["n_layers", "n_heads", "n_kv_heads", "head_dim"])  # of LlamaConfig


class SparseCache(Cache):
    """A text of at most capacity_tokens, which several calls of `generate` may continue, and its SparseDecoder."""

    def __init__(self, model, capacity_tokens):
        self.state, self.capacity = model.attnpred, capacity_tokens
        super().__init__(layers=[SparseLayer(self) for _ in range(self.state.n_layers)])
        self.decoder = None  # made when the first q and k tell their shapes
        self.n_tokens = self.prompt_end = 0  # read so far, and when the prompt is read
        self.reading = self.running = False  # a prompt; the model
        self.gathered_bytes = 0  # scores that other processes have sent to this one

    def check_usable(self):
        require(not self.running, "the model was interrupted while it read the cache's text: start with a new cache")

    def begin_forward(self, ids):
        self.check_usable()
        self.ids, self.running, self.n_calls, self.n_new = ids, True, 0, 0

    @torch.no_grad()
    def attend(self, layer, q, k, v):
        """Attention of the T newest tokens in one layer: q (Hq, T, D), k and v (Hk, T, D) -> (Hq, T, D)."""
        if self.n_calls == 0:
            self.begin(q, k)
        self.n_calls += 1
        alike = (len(q), len(k), k.shape[2], k.device) == self.shape
        require(alike, "layers with different heads or on different devices are not supported")
        return self.decoder.attend_prompt(layer, q, k, v) if self.reading else self.decoder.attend(layer, q, k, v)

    def begin(self, q, k):
        """Tokens come: of a prompt, or one to decode."""
        n_new, end = q.shape[1], self.n_tokens + q.shape[1]
        room = max(end, self.prompt_end) <= self.capacity
        require(room, f"the cache has room for {self.capacity:,} tokens: make a larger SparseCache")
        if self.decoder is None:
            self.decoder = self.make_decoder(q, k)
        d, self.n_new = self.decoder, n_new
        ids = -3 - torch.arange(self.n_tokens, end, device=q.device) if self.ids is None else self.ids[0]  # (T,)
        if not self.reading and (n_new > 1 or self.n_tokens == 0):
            self.reading, self.prompt_end = True, max(self.prompt_end, end)
            d.begin_prompt(torch.full((self.prompt_end - self.n_tokens,), -3, device=q.device))
        if self.reading:
            d.ids[self.n_tokens : end] = ids
        else:
            d.begin_token()
            d.advance(ids)

    @torch.no_grad()
    def end_forward(self):
        n_layers = len(self.layers)
        require(self.n_calls == n_layers, f"{self.n_calls} of {n_layers} layers attend: the model is not supported")
        d, self.running = self.decoder, False
        self.n_tokens += self.n_new
        if not self.reading:
            d.end_token()
            return
        d.n_tokens = self.n_tokens
        self.reading = self.n_tokens < self.prompt_end
        if not self.reading:
            d.end_prompt()

    def make_decoder(self, q, k):
        s, head_dim = self.state, q.shape[2]
        if has_streams(q.device):
            current = q.device.index == torch.cuda.current_device()
            require(current, f"Triton launches on the current device: call torch.cuda.set_device({q.device.index})")
        self.shape = len(q), len(k), head_dim, k.device
        shape = Shape(len(self.layers), len(q), len(k), head_dim)
        model = SimpleNamespace(config=shape, device=q.device, kv_dtype=k.dtype)
        fits = kernels.supports(head_dim, s.config.block_size, k.dtype.itemsize)
        backend = s.backend if fits else "torch"
        decoder = s.make_decoder(s.config, model, s.predictor, self.capacity, backend)
        if s.group:
            decoder.choose = partial(self.choose_together, decoder.choose)
        return decoder

    def choose_together(self, choose, scores):
        """`SparseDecoder.choose` among the heads of all processes: scores (L, Hk, n) -> (L, Hk, n) bool, Hk as here."""
        group = self.state.group
        parts = [torch.empty_like(scores) for _ in range(group.size())]
        torch.distributed.all_gather(parts, scores.contiguous(), group)
        self.gathered_bytes += sum(part.nbytes for part in parts) - scores.nbytes
        return choose(torch.cat(parts, 1)).chunk(group.size(), 1)[group.rank()]


class SparseLayer(CacheLayerMixin):
    """What transformers asks of a layer of a cache."""

    is_sliding = False

    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, *_): ...

    def update(self, k, v, *args, **_):
        return k, v  # the new ones alone: the decoder keeps the others

    def get_mask_sizes(self, query_length):
        return self.cache.n_tokens + query_length, 0

    def get_seq_length(self):
        return self.cache.n_tokens

    def get_max_length(self):
        return -1

    def refuse(self, *_):
        raise InputError("a SparseCache cannot be cropped, reset, repeated or reordered: make a new one")

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = refuse
