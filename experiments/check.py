"""Compares what a GPU computes with references, in a minute: `python -m experiments.check`.

Each line is one check: the command line, on a tiny model with random weights; every launcher against its PyTorch
reference, in bfloat16 with Llama-3.1-8B's heads; decoding with a CUDA graph against decoding without one, and from
host memory against from the device's, in two layers of that shape. A check that fails says why, and the next one runs.
The exit status is 1 if one failed.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import attnpred
from attnpred import Config, OneLineParser, SparseDecoder, require
from experiments import bench, hot_paths
from model import Llama, checkpoint_targets

TOLERANCE = 2e-2  # of the largest value, in bfloat16
SMALL = dict(
    block_size=8, sink_tokens=8, local_tokens=8, echo_blocks=1, budget=32, calibration_interval=4, history_len=5
)


def write_model(folder, m):
    """Save a model with random weights, whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = dict(num_hidden_layers=m.n_layers, hidden_size=m.d_model, intermediate_size=m.d_ff, head_dim=m.head_dim)
    shape |= dict(num_attention_heads=m.n_heads, num_key_value_heads=m.n_kv_heads, vocab_size=m.vocab_size)
    (folder / "config.json").write_text(json.dumps(shape | dict(model_type="llama", max_position_embeddings=512)))
    tensors = {name: tensor.clone() for name, tensor in checkpoint_targets(random_llama(m, "cpu")).items()}
    save_file(tensors, folder / "model.safetensors")


def random_llama(m, device):
    torch.manual_seed(0)
    model = Llama(m, torch.bfloat16, device).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.02)
    return model


def check_command(device, *options):
    """The command line, from its choice of a device to the exit."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as err:
        write_model(Path(folder), replace(bench.SHAPES["toy"], vocab_size=256))
        command = ["--model", folder, "--prompt", "A loop of words, " * 4, "--raw", "--stats", "--max-new-tokens", "9"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        with contextlib.redirect_stdout(io.StringIO()):
            status = attnpred.main([*command, "--device", device.type, *options])
    require(status == 0 and "recovery" in err.getvalue(), f"status {status}: {err.getvalue().strip()}")
    return err.getvalue().splitlines()[-1]


def check_launchers(paths, m, c, n_tokens, device):
    """The launchers of one hot path, as `bench kernels` calls them."""
    errors, calls = [], []
    for backend in ("triton", "torch"):  # the same random inputs
        torch.manual_seed(0)
        calls.append([(path[0], path[3]) for path in paths(m, c, n_tokens, torch.bfloat16, device, backend)])
    for (name, call), (_, reference) in zip(*calls):
        found, expected = call(), reference()
        found, expected = found.float().nan_to_num(neginf=-1), expected.float().nan_to_num(neginf=-1)
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        require(error <= TOLERANCE, f"{name}: the error is {error:.1e} of the largest value")
        errors.append(f"{error:.0e}")
    return ", ".join(errors)


def decode(model, c, n_tokens, offload=False, graph=True):
    """Logits (steps, V) of the same tokens after the same prompt, and the mean recovery."""
    torch.manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (n_tokens,), device=model.device)
    decoder = SparseDecoder(c, model, bench.predictor(), n_tokens, "triton", offload)
    decoder.captured = decoder.captured if graph else None
    decoder.prefill(tokens[: n_tokens - 2 * c.interval(n_tokens)])
    logits = [decoder.decode(token).clone() for token in tokens[n_tokens - 2 * c.interval(n_tokens) :].split(1)]
    recovery = decoder.stats.recovery
    return torch.stack(logits), torch.stack(recovery).mean().item() if recovery else 1.0


def check_decoding(model, c, n_tokens, one, other, equal):
    """Two ways to decode agree: to the bit, or within the tolerance."""
    (a, recovery), (b, other_recovery) = decode(model, c, n_tokens, **one), decode(model, c, n_tokens, **other)
    error = ((a - b).abs().max() / b.abs().max()).item()
    require(
        a.isfinite().all() and error <= (0 if equal else TOLERANCE), f"the error is {error:.1e} of the largest logit"
    )
    require(abs(recovery - other_recovery) < 0.02, f"recoveries are {recovery:.3f} and {other_recovery:.3f}")
    return f"{error:.0e}"


def checks(device, shape, n_tokens):
    """Yield pairs: a name, and a function that returns what was found, or raises."""
    yield "command line", partial(check_command, device)
    yield "command line, offloaded", partial(check_command, device, "--offload")
    m, c = (
        replace(bench.SHAPES[shape], n_layers=1 if shape == "toy" else 2),
        Config(**SMALL) if shape == "toy" else Config(),
    )
    for paths in hot_paths.PATHS[:-1]:  # what copy_blocks copies, decoding with `offload` shows
        yield paths.__name__, partial(check_launchers, paths, m, c, n_tokens, device)
    model = random_llama(m, device)
    decoding, offloaded = partial(check_decoding, model, c, n_tokens), dict(offload=True)
    if device.type == "cuda":
        yield "graph, none", partial(decoding, {}, dict(graph=False), True)
        yield "graph, none, offloaded", partial(decoding, offloaded, dict(offload=True, graph=False), True)
    dense = partial(check_decoding, model, bench.dense(c), n_tokens)
    yield "resident, offloaded, all blocks", partial(dense, {}, offloaded, False)


def main(argv=None):
    parser = OneLineParser(prog="check", description=__doc__.splitlines()[0])
    parser.add_argument("--model-shape", choices=("toy", "llama-3.1-8b"), default="llama-3.1-8b", help="toy: to try it")
    parser.add_argument("--n-tokens", type=int, default=4096, help="context of the launchers and of decoding")

    def run():
        args = parser.parse_args(argv)
        device, _, _ = attnpred.choose_device(SimpleNamespace(device="auto", dtype="auto", backend="triton"))
        failed = 0
        for name, check in checks(device, args.model_shape, args.n_tokens):
            began = time.perf_counter()
            try:
                result = f"ok: {check()}"
            except Exception as error:
                failed, result = failed + 1, f"FAILED: {error!r}".splitlines()[0]
            print(f"{name} ({time.perf_counter() - began:.1f} s): {result}", flush=True)
        require(not failed, f"{failed} checks failed")

    return attnpred.exit_status("check", run)


if __name__ == "__main__":
    sys.exit(main())
