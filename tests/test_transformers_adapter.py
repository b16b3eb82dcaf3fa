"""Tests the adapter for transformers: against dense `generate`, against our own loop, and two processes against one.

Run as a script under torchrun, it is one of these processes.
"""

import pathlib

import pytest
import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from attnpred import Config, SparseDecoder
from experiments.transformers_adapter import SparseCache, attach, detach
from model import load_model
from tests.helpers import random_predictor

FOLDER = pathlib.Path(__file__).parent.parent
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=61, max_position_embeddings=1024)
SMALL |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False)
SPARSE = dict(block_size=8, history_len=8, sink_tokens=8, local_tokens=16, budget=64, echo_blocks=2)
COVERING = SPARSE | dict(budget=1024)
IDS = torch.randint(1, 61, (1, 300), generator=torch.Generator().manual_seed(3))


def tiny(kind="llama", heads=4, kv_heads=2, **changes):
    """A model of transformers with random weights, large enough that heads differ in what they attend to."""
    shape = SMALL | dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model


def save_tiny(folder, **changes):
    """A folder with a tiny Llama, whose tokenizer has a token for each letter."""
    tiny(**changes).save_pretrained(folder)
    letters = {chr(62 + i): i for i in range(61)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="@"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    special = dict(unk_token="@", pad_token=">", eos_token="z")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def decoded(model, ids=IDS, n_new=24, **options):
    """Greedy tokens after the prompt, and the logits (n_new, V) that they were taken from."""
    options = dict(max_new_tokens=n_new, do_sample=False, output_logits=True, return_dict_in_generate=True) | options
    out = model.generate(ids, **options)
    return out.sequences[0, -n_new:].tolist(), torch.cat(out.logits)


def assert_same(one, other):
    assert one[0] == other[0]
    torch.testing.assert_close(one[1], other[1], rtol=1e-3, atol=1e-3)


FAMILIES = [  # heads, KV heads
    ("gemma", 4, 1, {}),
    ("olmo2", 4, 4, {}),
    ("granite", 4, 2, dict(attention_multiplier=0.6)),
    ("starcoder2", 4, 1, dict(sliding_window=None)),
    ("cohere", 4, 2, {}),
    ("phi", 4, 4, {}),
    ("gpt_neox", 2, 2, {}),
]


@pytest.mark.parametrize("kind, heads, kv_heads, changes", FAMILIES)
def test_families(kind, heads, kv_heads, changes):
    """Equal to dense `generate` while the budget covers the text; something else beyond it."""
    model = tiny(kind, heads, kv_heads, **changes)
    dense = decoded(model)
    attach(model, random_predictor(), **COVERING)
    assert_same(decoded(model), dense)
    attach(model, random_predictor(), **SPARSE)
    sparse = decoded(model)
    assert not torch.allclose(sparse[1][4], dense[1][4], atol=1e-3) and sparse[1].isfinite().all()
    detach(model)
    assert torch.equal(decoded(model)[1], dense[1])


def ours(folder, config, ids=IDS, n_new=24, backend="torch"):
    """What `decoded` returns, of our own loop; and its decoder."""
    model, _ = load_model(str(folder), torch.float32, torch.device("cpu"))
    decoder = SparseDecoder(config, model, random_predictor(), ids.shape[1] + n_new, backend)
    logits, tokens = [decoder.prefill(ids[0])], []
    for _ in range(n_new):
        tokens.append(logits[-1].argmax().item())
        logits.append(decoder.decode(torch.tensor(tokens[-1:])))
    return (tokens, torch.stack(logits[:-1])), decoder


@pytest.mark.parametrize("interval", [1, 5, "auto"])
def test_beyond_the_budget_it_is_our_own_loop(tmp_path, interval):
    options = SPARSE | dict(calibration_interval=interval)
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path))
    wanted, decoder = ours(tmp_path, Config(**options))
    attach(model, random_predictor(), **options)
    assert_same(decoded(model, cache=(cache := SparseCache(model, 323))), wanted)
    assert cache.decoder.selecting and cache.decoder.stats.echoes > 0
    for chunk in 64, 299:  # the prompt in chunks; the last one has one token
        assert_same(decoded(model, prefill_chunk_size=chunk), wanted)


def test_kernels(tmp_path):
    options, short = SPARSE | dict(calibration_interval=1, history_len=5), dict(ids=IDS[:, :90], n_new=2)
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, num_hidden_layers=1))
    attach(model, random_predictor(), "triton", **options)
    assert_same(decoded(model, **short), ours(tmp_path, Config(**options), **short)[0])
