"""The command line and the decoder on fake GPUs: see fake_gpu.py for what these refuse."""

import gc
import re
from dataclasses import replace

import pytest
import torch

import attnpred
import kernels
from attnpred import Config, SparseDecoder
from experiments import roofline
from model import causal_attention
from tests.fake_gpu import FakeGpu, to_device
from tests.helpers import assert_refused, random_predictor, tiny_llama
from tests.test_model import random_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gpu.sh checks the same on the real GPU")
REFERENCES = {  # launchers of a step: their references wait for the device, and may not be captured one by one
    (kernels, name): None
    for name in ("find_echoes", "select_blocks", "rotate_and_write", "sparse_decode", "swiglu", "copy_blocks")
}

# --------------------------------------------------------------------------------------------------------------------
# The command line, from the choice of a device to the exit
# --------------------------------------------------------------------------------------------------------------------

METHOD = "--block-size 8 --sink-tokens 8 --local-tokens 8 --budget 32 --history-len 5 --calibration-interval 4"
PROMPT = "A loop, a loop, a loop of words, a loop of words again: a loop"  # of 62 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with one layer and random weights, whose tokens are bytes."""
    folder = tmp_path_factory.mktemp("model")
    shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    random_model(folder, num_hidden_layers=1, **shape)
    return folder


def answer(folder, *options):
    """The exit status of a command."""
    command = ["--model", str(folder), "--prompt", PROMPT, "--raw", "--stats", "--echo-blocks", "1", *METHOD.split()]
    return attnpred.main([*command, "--max-new-tokens", "8", *options])


def assert_nothing_is_left(gpu):
    gc.collect()
    assert not any(gpu.allocated.values()) and not gpu.faults


@pytest.mark.parametrize("offload", [[], ["--offload"]], ids=["resident", "offloaded"])
@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_the_command_answers_as_on_a_cpu(folder, device, offload, capsys):
    with FakeGpu(REFERENCES) as gpu:
        status = answer(folder, "--device", device, "--dtype", "float32", *offload)
        assert status == 0, capsys.readouterr().err
    text, err = capsys.readouterr()
    assert gpu.replays == [6] and gpu.index == (device == "cuda:1")
    assert "recovery" in err and "x less" in err and ("link" in err) == bool(offload)
    assert_nothing_is_left(gpu)
    assert answer(folder, "--device", "cpu", "--dtype", "float32", *offload) == 0
    assert capsys.readouterr().out == text


def test_the_command_runs_its_kernels(folder, capsys, monkeypatch):
    """In bfloat16, the default, and with a budget that the text outgrows."""
    monkeypatch.setattr(kernels, "n_multiprocessors", lambda device: 1)  # few programs for the interpreter
    monkeypatch.setattr(attnpred, "PREFILL_CHUNK", 32)
    with FakeGpu() as gpu:
        status = answer(folder, "--offload", "--budget", "64", "--max-new-tokens", "5")
        assert status == 0, capsys.readouterr().err
    assert gpu.replays == [3] and "fetched" in capsys.readouterr().err
    assert_nothing_is_left(gpu)


REFUSED = {  # FakeGpu's options, the command's, the complaint
    "no such device": ({}, "--device cuda:2", "device cuda:2 is not available"),
    "too little memory": (dict(memory=75_000), "--offload", "GB of memory on cuda:0"),
    "memory is gone": (dict(memory=70_000, promised=1 << 30), "", "out of GPU memory: try a shorter text"),
    "not even the weights": (dict(memory=9_000), "", "out of GPU memory: try a shorter text, a smaller model"),
    "not pinned": (dict(pinnable=False), "--offload", "cannot be pinned"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_command_refuses_in_one_line(folder, case, capsys):
    options, arguments, complaint = REFUSED[case]
    with FakeGpu(REFERENCES, **options) as gpu:
        assert_refused(lambda arguments: answer(folder, *arguments), "attnpred", arguments.split(), complaint, capsys)
        torch.ones(1, device="cuda").add_(1)  # no error of CUDA is left for what comes next
    assert_nothing_is_left(gpu)


def test_expanded_keys_need_memory(monkeypatch):
    """In float32, attention on a GPU repeats K and V for each of 32 query heads of 128: 4.3 GB for 128K tokens."""
    m, complaints = roofline.LLAMA_31_8B, []
    monkeypatch.setattr(attnpred, "free_memory", lambda device: 0)
    for device in ("cpu", "cuda"):
        problem = attnpred.lacks_memory(Config(), m, 1 << 17, torch.float32, torch.device(device), offload=False)
        complaints.append(float(re.search(r"needs ([\d.]+) GB", problem)[1]))
    assert 34 < complaints[0] < 37 and 3.8 < complaints[1] - complaints[0] < 4.4


@pytest.mark.parametrize("past", [0, 5])
def test_amd_gets_a_mask_of_its_own(past, monkeypatch):
    """The mask that AMD's kernel understands is that of the other GPUs."""
    q, kv = torch.rand(4, 3, 16), torch.rand(2, 2, 3 + past, 16)
    expected = causal_attention(0, q, *kv)
    for hip in (None, "6.4"):
        monkeypatch.setattr(torch.version, "hip", hip)
        with FakeGpu():
            found = causal_attention(0, q.to("cuda"), *kv.to("cuda")).cpu()
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------------------
# What the fake refuses
# --------------------------------------------------------------------------------------------------------------------


def in_a_capture(body):
    """Capture body(x, event, stream): a tensor, an event of before and a stream that is not captured."""
    x, graph, other = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    capture = torch.cuda.graph(graph)
    with torch.cuda.stream(capture.capture_stream):
        x + 1  # the stream must have been used
    event = other.record_event()
    with capture:
        x.add_(1)
        body(x, event, other)


def on_stream(stream, body):
    with torch.cuda.stream(stream):
        body()


@pytest.mark.parametrize(
    "body, message",
    [
        (lambda: torch.cuda.set_device(torch.device("cuda")), "with a specified index"),
        (lambda: torch.ones(2, device="cuda") + torch.ones(2, device="cuda:1"), "device"),
        (lambda: torch.ones(2, device="cuda") + torch.ones(2), "device"),
        (lambda: torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda").half(), "dtype"),
        (lambda: torch.ones(2, device="cuda").copy_(torch.ones(2), non_blocking=True), "pageable"),
        (lambda: kernels.select_blocks(torch.ones(1, 9, device="cuda:1"), 2, "triton"), "Pointer argument"),
        (lambda: in_a_capture(lambda x, event, stream: x.sum().item()), "host waits"),
        (lambda: in_a_capture(lambda x, event, stream: x.cpu()), "host waits"),
        (lambda: in_a_capture(lambda x, event, stream: x.copy_(torch.ones(3))), "host waits"),
        (lambda: in_a_capture(lambda x, event, stream: torch.cuda.synchronize()), "host waits"),
        (lambda: in_a_capture(lambda x, event, stream: torch.ones(1, pin_memory=True)), "host waits"),
        (lambda: in_a_capture(lambda x, event, stream: torch.cuda.current_stream().wait_event(event)), "not capture"),
        (lambda: in_a_capture(lambda x, event, stream: on_stream(stream, x.clone)), "another stream"),
        (lambda: in_a_capture(lambda x, event, stream: on_stream(stream, x.zero_)), "another stream"),
    ],
)
def test_what_a_gpu_refuses(body, message):
    with FakeGpu(), pytest.raises((RuntimeError, ValueError), match=message):
        body()


# --------------------------------------------------------------------------------------------------------------------
# The decoder with a CUDA graph
# --------------------------------------------------------------------------------------------------------------------


def decode(config, prompt_len, n_tokens, offload, graph):
    """Logits, recoveries and echoes after a prompt and n_tokens; how often each graph was replayed."""
    tokens = torch.randint(3, (prompt_len + n_tokens,), generator=torch.Generator().manual_seed(0))
    with FakeGpu(REFERENCES) as gpu:
        model, tokens = to_device(tiny_llama(n_layers=2, group=1, context_len=600)), tokens.to("cuda")
        decoder = SparseDecoder(config, model, random_predictor(), len(tokens), "triton", offload)
        assert decoder.captured
        decoder.captured = decoder.captured if graph else None
        logits = [decoder.prefill(tokens[:prompt_len])]
        logits += [decoder.decode(token).clone() for token in tokens[prompt_len:, None]]
        assert decoder.position.item() == len(tokens) - 1 and decoder.interval == config.interval(len(tokens))
        results = torch.stack(logits), torch.stack(decoder.stats.recovery), decoder.stats.echoes.sum()
        del decoder  # while the GPU is faked: it waits for its streams
        return *(x.cpu() for x in results), gpu.replays


CONFIG = Config(
    block_size=8, sink_tokens=8, local_tokens=8, budget=40, history_len=6, calibration_interval=4, echo_blocks=2
)
GROWS = replace(CONFIG, calibration_interval="auto", budget=64, echo_blocks=1)
CASES = [(CONFIG, 41, 22), (GROWS, 505, 30)]  # config, tokens of the prompt, tokens decoded


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
@pytest.mark.parametrize("case", CASES, ids=["outgrows the budget", "M goes from 16 to 32"])
def test_a_graph_changes_nothing(case, offload):
    *expected, none = decode(*case, offload, graph=False)
    *found, replays = decode(*case, offload, graph=True)
    assert all(map(torch.equal, found, expected)) and expected[-1] > 0
    assert not none and replays == [case[2] - 1]  # one graph, of the second token
