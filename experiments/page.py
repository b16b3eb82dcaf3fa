"""Writes a page that shows a run from inside: one HTML file without network, to open in a browser and play with.

    python -m experiments.page --prompt-file README.md --prompt "What is the licence of this project?" --out run.html

Reading order: `PageRecorder` records a run, `layer_arrays` are what the page shows of a layer, `make_page` packs them.
The page itself is page.html.
"""

import base64
import json
import pathlib
import sys
import zlib
from functools import partial

import numpy as np
import torch

import attnpred
from attnpred import InputError, OneLineParser, exit_status
from experiments.bench import output_file
from experiments.plots import Recorder, clear_heads, matches
from model import TextStream, load_model
from train_predictor import write_atomically
from weights.fetch_llm import DEFAULT_LLM, fetch_default_llm

PAGE_BYTES = 2_000_000  # a page that would be larger shows fewer layers
LEVELS = 15  # the history's colours above black
NOT_ATTENDED, SINK, LOCAL, SELECTED, ECHO = range(5)


class PageRecorder(Recorder):
    """A Recorder that also keeps each block's share of the true attention, and all predictions."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shares = []  # (L, Hk, capacity) per step: each block's share of the true attention, mean over query heads
        self.history_rows = []  # (L, Hk, H, N) of the first prediction, then the newest row (L, Hk, 1, N) of the others
        self.predictions = []  # (start, end, scores (L, Hk, end - start), lowest score chosen or None) each
        self.serving = []  # per step: which of the predictions it uses, -1 for none

    def choose(self, scores):
        chosen = super().choose(scores)  # (L, Hk, n)
        if self.selecting:
            rows, start, scores = self.next_prediction
            self.history_rows.append(rows[:, :, -1:] if self.history_rows else rows)
            lowest = scores[chosen.cpu()].min().item() if chosen.any() else None
            self.predictions.append((start, start + scores.shape[-1], scores, lowest))
        return chosen

    def begin_token(self):
        super().begin_token()
        self.shares.append(torch.zeros(self.cache.address.shape))
        self.serving.append(len(self.predictions) - 1)

    def mass(self, layer, q):
        mass = super().mass(layer, q)  # (Hq, N)
        self.shares[-1][layer, :, : mass.shape[1]] = self.group_mean(mass).cpu()
        return mass


def reasons(recorder):
    """Why each block is attended: (L, Hk, steps, N) uint8 of NOT_ATTENDED, SINK, LOCAL, SELECTED and ECHO."""
    r, c = recorder, recorder.config
    out = torch.stack([blocks[..., : c.n_blocks(r.n_tokens)] for blocks in r.chosen], 2)  # 1 attended, 2 an echo
    out = torch.tensor([NOT_ATTENDED, SELECTED, ECHO], dtype=torch.uint8)[out.long()]
    for step, i in enumerate(r.serving):
        n_tokens = r.stats.prefill_tokens + step + 1
        start, end = c.middle(n_tokens) if i < 0 else r.predictions[i][:2]
        out[:, :, step, :start], out[:, :, step, end : c.n_blocks(n_tokens)] = SINK, LOCAL
    return out.numpy()


def layer_arrays(recorder):
    """What the page shows of each layer, by name, as arrays (L, Hk, steps, predictions or rows, N).

    attention   thousandths of the true attention in each step, uint16
    scores      ten-thousandths, of each prediction, int16; 0 outside of the middle
    reasons     in each step, uint8
    history     rows from the oldest one of the first prediction to the newest one of the last, uint8 up to LEVELS
    """
    r, n = recorder, recorder.config.n_blocks(recorder.n_tokens)
    shares = torch.stack([share[..., :n] for share in r.shares], 2)
    scores = torch.zeros(*r.cache.heads, len(r.predictions), n)
    for i, (start, end, predicted, _) in enumerate(r.predictions):
        scores[:, :, i, start:end] = predicted
    rows = [torch.nn.functional.pad(rows, (0, n - rows.shape[-1])) for rows in r.history_rows]
    rows = torch.cat(rows, 2)  # (L, Hk, H + predictions - 1, N)
    brightest = rows[..., start:end].amax((2, 3), keepdim=True).clamp_min(1e-3)
    return dict(
        attention=(1000 * shares).round().numpy().astype(np.uint16),
        scores=(10_000 * scores).round().clamp(-32_768, 32_767).numpy().astype(np.int16),
        reasons=reasons(r),
        history=(LEVELS * (rows / brightest).clamp(0, 1) ** 0.4).round().numpy().astype(np.uint8),
    )


def overview(recorder, reasons):
    """Of all heads, (L, Hk, steps) uint16 each: the number of blocks attended, the recovery, and how much of the true
    attention the blocks get that are attended for each of the reasons, NOT_ATTENDED first; in thousandths."""
    r, shares = recorder, torch.stack([share[..., : reasons.shape[-1]] for share in recorder.shares], 2)
    recovery = torch.stack([torch.stack(layers) for layers in r.recovery], 2)  # (L, Hq, steps)
    recovery = recovery.unflatten(1, (r.cache.heads[1], -1)).mean(2)  # (L, Hk, steps)
    by_reason = [(shares * torch.tensor(reasons == reason)).sum(-1) for reason in range(5)]
    thousandths = [(1000 * x).round().numpy().astype(np.uint16) for x in (recovery, *by_reason)]
    return (reasons != NOT_ATTENDED).sum(-1).astype(np.uint16), *thousandths


def pack(*arrays) -> str:
    """The arrays' bytes, one after another, compressed, as text."""
    return base64.b64encode(zlib.compress(b"".join(array.tobytes() for array in arrays), 9)).decode()


def make_page(recorder: PageRecorder, pieces: list[str], model_name: str) -> str:
    """The HTML of a run's page, at most PAGE_BYTES; pieces: the text of each token. Raises InputError."""
    r, c = recorder, recorder.config
    if not r.prediction:
        why = "the text fits the budget (use a smaller --budget), or the answer ended before a second token was decoded"
        raise InputError(f"nothing was predicted: {why}")
    arrays, steps = layer_arrays(r), range(len(r.chosen))
    patterns = clear_heads(r)
    data = dict(
        model=model_name,
        pieces=pieces,
        config=dict(b=c.block_size, H=c.history_len, S=c.sink_tokens, R=c.local_tokens, B=c.budget, E=c.echo_blocks),
        nPrompt=r.stats.prefill_tokens,
        nBlocks=c.n_blocks(r.n_tokens),
        heads=r.cache.heads,
        levels=LEVELS,
        nSelected=r.cache.heads[0] * r.cache.heads[1] * c.topk_blocks,
        predictions=[dict(start=start, end=end, lowest=lowest) for start, end, _, lowest in r.predictions],
        serving=r.serving,
        echoes=[[[p // c.block_size, run, p] for run, p in matches(r, step)] for step in steps],
        bytes=r.bytes[1:],
        patterns=patterns,
        overview=pack(*overview(r, arrays["reasons"])),
        layers={},
    )
    template = pathlib.Path(__file__).with_suffix(".html").read_text()
    room = PAGE_BYTES - len((template + to_json(data)).encode())
    spread = sorted(range(r.cache.heads[0]), key=lambda layer: layer * 0.618 % 1)  # any first few are far apart
    for layer in dict.fromkeys([*(layer for layer, _ in patterns.values()), *spread]):
        packed = pack(*(array[layer] for array in arrays.values()))
        room -= len(packed) + 10  # its number and punctuation
        if room < 0:
            break
        data["layers"][layer] = packed
    if not data["layers"]:
        raise InputError(f"a page of {PAGE_BYTES:,} bytes cannot hold the run: try fewer --max-new-tokens")
    return template.replace("{{DATA}}", to_json(data))


def to_json(data):
    """JSON that may stand in a <script>, which "</script>" would end."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def run(argv):
    more = "it takes all options of attnpred.py (python attnpred.py --help)"
    parser = OneLineParser(prog="page", description=__doc__.splitlines()[0], epilog=more, allow_abbrev=False)
    parser.add_argument("--out", required=True, type=partial(output_file, ".html"), metavar="FILE.html")
    args, rest = parser.parse_known_args(argv)
    options = attnpred.parse_options(rest)
    if options.dense or options.offload or options.chat or options.max_new_tokens < 2:
        why = "leave out --dense, --offload and --chat, decode 2 tokens or more"
        raise InputError(f"the page shows sparse decoding: {why}")
    recorder = attnpred.run(options, PageRecorder)
    tokenizer = load_model(options.model or str(fetch_default_llm()), torch.bfloat16, "cpu")[1]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in recorder.ids[: recorder.n_tokens].tolist()]
    pieces[-1] += stream.flush()
    name = pathlib.PurePath(options.model or DEFAULT_LLM).name
    write_atomically(args.out, make_page(recorder, pieces, name).encode())


def main(argv=None) -> int:
    return exit_status("page", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
