"""A Llama, a predictor and a tokenizer to compare computations with; weights are random."""

import torch

from attnpred import Predictor
from model import Llama, LlamaConfig


def tiny_llama(n_layers=3, n_kv_heads=2, group=2, head_dim=16, context_len=512, seed=0, **changes):
    """A Llama with a few thousand random weights and a vocabulary of 61 tokens."""
    torch.manual_seed(seed)
    shape = dict(
        n_layers=n_layers,
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_model=32,
        d_ff=48,
        vocab_size=61,
        context_len=context_len,
        rope_theta=10000.0,
        rope_scaling=None,
        rms_eps=1e-5,
        tie_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        eos_token_ids=(),
    )
    model = Llama(LlamaConfig(**(shape | changes)))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.3)
    return model


class LetterTokenizer:
    """One token per character, modulo the vocabulary of `tiny_llama`."""

    has_chat_template = True

    def encode(self, text, special_tokens=True, control_tokens=True):
        return [ord(character) % 61 for character in text]

    def decode(self, ids):
        return "".join(chr(61 + token) for token in ids)  # `encode` reverses this

    def chat(self, messages):
        return f"<{messages[0]['content']}>"

    def chat_tokens(self, messages):
        return self.encode(self.chat(messages))


def random_predictor(seed=0):
    torch.manual_seed(seed)
    return Predictor().requires_grad_(False)


def assert_refused(main, program, arguments, message, capsys):
    """The command ends with status 2 and prints one line that starts with the program's name and contains `message`."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{program}: ") and err.count("\n") == 1 and message in err, err
