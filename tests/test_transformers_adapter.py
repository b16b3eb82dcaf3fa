"""Tests the adapter for transformers: against dense `generate`, against our own loop, and two processes against one.

Run as a script under torchrun, it is one of these processes.
"""

import gc
import json
import os
import pathlib
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedTokenizerFast,
    TextStreamer,
)
from transformers.distributed import DistributedConfig

from attnpred import DEFAULT_PREDICTOR, Config, InputError, SparseDecoder, generate, load_predictor
from experiments.transformers_adapter import SparseCache, attach, detach, readable
from model import load_model
from tests.helpers import random_predictor
from weights.fetch_llm import fetch_default_llm

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
    assert cache.decoder.selecting and cache.decoder.stats.echoes.any()
    for chunk in 64, 299:  # the prompt in chunks; the last one has one token
        assert_same(decoded(model, prefill_chunk_size=chunk), wanted)


def test_kernels(tmp_path):
    options, short = SPARSE | dict(calibration_interval=1, history_len=5), dict(ids=IDS[:, :90], n_new=2)
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path, num_hidden_layers=1))
    attach(model, random_predictor(), "triton", **options)
    assert_same(decoded(model, **short), ours(tmp_path, Config(**options), **short)[0])


def test_the_default_model_beyond_the_budget():
    folder, text = readable(fetch_default_llm()), (FOLDER / "kernels.py").read_text()
    model, _ = load_model(str(folder), torch.float32, torch.device("cpu"))
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :500]
    decoder = SparseDecoder(Config(budget=256), model, load_predictor(DEFAULT_PREDICTOR), 512)
    wanted = list(generate(decoder, ids[0].tolist(), 12))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    attach(model, budget=256)
    assert decoded(model, ids, 12)[0] == wanted and len(set(wanted)) > 6


# Ways to call


def test_sampling_streaming_and_pipeline(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = tokenizer.decode(IDS[0])
    options = dict(max_new_tokens=8, pad_token_id=0)

    def run():
        torch.manual_seed(1)
        sampled = model.generate(IDS, do_sample=True, streamer=TextStreamer(tokenizer), **options)
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, do_sample=False)
        return sampled.tolist(), pipe(text, **options), capsys.readouterr().out

    dense = run()
    attach(model, random_predictor(), **COVERING)
    assert run() == dense and dense[2] == tokenizer.decode(dense[0][0]) + "\n"


@pytest.mark.parametrize("whole", [True, False])
def test_chat_goes_on_with_a_cache(whole):
    """While the text fits the budget decoding is dense, so that the longer prompt finds the same K, V and rows."""
    model = tiny()
    attach(model, random_predictor(), **SPARSE)
    cache = SparseCache(model, 330)
    turn = model.generate(IDS[:, :30], cache=cache, max_new_tokens=5, do_sample=False)  # (1, 35), of which 34 were read
    text = torch.cat((turn, IDS[:, 30:]), 1)  # (1, 305)
    more, mask = text if whole else text[:, 34:], torch.ones_like(text)
    assert_same(decoded(model, more, cache=cache, attention_mask=mask), decoded(model, text))
    assert torch.equal(cache.decoder.ids[:305], text[0]) and cache.decoder.selecting
    assert cache.get_seq_length() == 328 and cache.decoder.stats.prefill_tokens == 301


def test_a_short_turn_moves_the_history_up():
    """20 tokens are five queries, 4 apart, and four of them make a row."""
    model = tiny()
    attach(model, random_predictor(), **SPARSE)
    cache = SparseCache(model, 330)
    model(IDS[:, :200], cache=cache)
    before = cache.decoder.history.rows.clone()
    model(IDS[:, 200:220], cache=cache)
    assert torch.equal(cache.decoder.history.rows[:, :-2], before[:, 2:])


def test_embeddings_have_no_echoes():
    model = tiny()
    dense = decoded(model)
    attach(model, random_predictor(), **SPARSE)
    cache, embedded = SparseCache(model, 330), model.get_input_embeddings()(IDS)
    found = decoded(model, None, inputs_embeds=embedded, cache=cache)
    assert len(set(cache.decoder.ids[:300].tolist())) == 300 and not cache.decoder.stats.echoes.any()
    attach(model, random_predictor(), **COVERING)
    assert_same(decoded(model, None, inputs_embeds=embedded), dense)
    assert found[0] != dense[0]


def test_without_a_cache_of_ours_it_is_dense():
    model = tiny()
    dense = model(IDS).logits
    attach(model, random_predictor(), **SPARSE)
    torch.testing.assert_close(model(IDS).logits, dense, rtol=1e-3, atol=1e-3)


def test_an_interrupted_text_is_over_and_the_next_one_is_not():
    model = tiny()
    attach(model, random_predictor(), **SPARSE)
    wanted, cache = decoded(model), SparseCache(model, 330)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        decoded(model, cache=cache)
    hook.remove()
    assert_same(decoded(model), wanted)
    with pytest.raises(InputError, match="interrupted"):
        decoded(model, cache=cache)


def test_nothing_else_keeps_keys_and_values():
    def live_bytes():
        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    model = tiny(num_hidden_layers=1, heads=2, kv_heads=2, max_position_embeddings=8192)
    attach(model, random_predictor(), **SPARSE)
    before = live_bytes()
    cache = SparseCache(model, 8192)
    model.generate(torch.randint(1, 61, (1, 8000)), cache=cache, max_new_tokens=4)
    assert cache.decoder.cache.kv.nbytes == 2 * 2 * 8192 * 16 * 4
    assert live_bytes() - before < 1.4 * cache.decoder.cache.kv.nbytes


def test_the_example(capsys):
    example = (FOLDER / "experiments/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(example, {})
    assert "sky" in capsys.readouterr().out


# Refusals

REFUSED = {
    "one sequence at a time": dict(ids=IDS.expand(2, -1)),
    "give a batch of 1": dict(do_sample=True, num_return_sequences=2),
    "beam_search is not supported": dict(num_beams=2),
    "assisted_generation is not supported": dict(prompt_lookup_num_tokens=3),
    "output_attentions is not supported": dict(output_attentions=True),
    "use_cache=False is not supported": dict(use_cache=False),
    "cache_implementation='static' is not supported": dict(cache_implementation="static"),
    "a DynamicCache is not supported": dict(cache=DynamicCache()),
    "padding is not supported": dict(attention_mask=(IDS > 5).long()),
}


@pytest.mark.parametrize("message", REFUSED)
def test_generate_refuses(message):
    model = tiny()
    attach(model, random_predictor(), **SPARSE)
    with pytest.raises(InputError, match=message) as error:
        decoded(model, **REFUSED[message])
    assert "\n" not in str(error.value)


MODELS_REFUSED = {
    "layers of sliding_attention": ("gemma2", {}),
    "has softcap: only plain attention": ("gemma2", dict(layer_types=3 * ["full_attention"])),
    "has sliding_window: only plain attention": ("mistral", dict(sliding_window=64)),
    "layers of linear_attention": ("qwen3_next", {}),
    "has s_aux": ("gpt_oss", dict(layer_types=3 * ["full_attention"], num_local_experts=2, num_experts_per_tok=1)),
    "does not call transformers' attention": ("bloom", {}),
}


@pytest.mark.parametrize("message", MODELS_REFUSED)
def test_models_refused(message):
    kind, changes = MODELS_REFUSED[message]
    model = tiny(kind, **changes)
    with pytest.raises(InputError, match=message):
        attach(model, random_predictor(), **SPARSE)
        decoded(model)


def test_other_refusals():
    model = tiny()
    for options in dict(budge=1), dict(budget=3), dict(backend="cuda"):
        with pytest.raises(InputError, match=next(iter(options))):
            attach(model, random_predictor(), **options)
    model._tp_size = 4
    with pytest.raises(InputError, match="4 processes cannot share 2 KV heads"):
        attach(model, random_predictor())
    model._tp_size = None
    attach(model, random_predictor(), **SPARSE)
    cache = SparseCache(model, 310)
    with pytest.raises(InputError, match="room for 310 tokens"):
        decoded(model, cache=cache)
    with pytest.raises(InputError, match="room for 200 tokens"):
        decoded(model, cache=SparseCache(model, 200), prefill_chunk_size=50)
    with pytest.raises(InputError, match="cannot be cropped"):
        cache.crop(1)
    with pytest.raises(InputError, match="mask of your own"):
        model(IDS, attention_mask=torch.zeros(1, 1, 300, 300), cache=SparseCache(model, 310))


# Several processes


def read_three_settings(folder, **options):
    """Tokens and bytes gathered, with a covering budget and with M = 1 and 5 beyond it; for one process or several."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    results = []
    for setting in COVERING, SPARSE | dict(calibration_interval=1), SPARSE | dict(calibration_interval=5):
        attach(model, random_predictor(), **setting)
        cache = SparseCache(model, 323)
        results.append((decoded(model, cache=cache)[0], cache.gathered_bytes))
    return results


def test_two_processes_are_one(tmp_path):
    """Each has two of four KV heads. Selection by each process for itself gives other tokens."""
    folder = save_tiny(tmp_path / "model", heads=8, kv_heads=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["tests.test_transformers_adapter", str(folder)]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    tokens = [setting[0] for setting in read_three_settings(folder)]
    start, ends = 1, [(n + 1 - 16) // 8 for n in range(300, 324)]  # the middle's blocks, when n tokens were read
    gathered = [0] + [sum(3 * 2 * (end - start) * 4 for end in ends[::m]) for m in (1, 5)]  # L, Hk, n, float32
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]
    assert found == 2 * [[list(pair) for pair in zip(tokens, gathered)]]


if __name__ == "__main__":
    found = read_three_settings(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
    # a file each: on standard output gloo's messages may come between
    pathlib.Path(sys.argv[1], f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
